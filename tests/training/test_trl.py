"""trl's SFTTrainer as a client, in an environment beside `.venv` that has trl."""

import json
import subprocess
from pathlib import Path

import pytest
import side

pytestmark = pytest.mark.slow

EXAMPLES = side.ROOT / "examples"


@pytest.fixture(scope="module")
def python() -> Path:
    return side.python("trl", side.extra("trl"))


def run(python: Path, script: Path, place: Path, *arguments: str) -> str:
    given = side.environment(side.ROOT / "tests", EXAMPLES)
    done = subprocess.run([python, script, *arguments], env=given, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_sft_trainers_give_the_adapter_of_plain_training_and_a_mean_by_hand(python: Path, tmp_path: Path) -> None:
    out = run(python, Path(__file__).with_name("trl_federation.py"), tmp_path, str(tmp_path))
    found = json.loads(out.splitlines()[-1])
    assert found["off"] <= 1e-5 and found["off_in_models"] <= 1e-5 and found["moved"] > 1e-3, found
    assert found["rounds"] == [2, 2] and found["modules"] == 14 and found["loss"][1] < found["loss"][0]


def test_the_example_runs(python: Path, tmp_path: Path) -> None:
    assert "evaluation loss" in run(python, EXAMPLES / "trl_client.py", tmp_path)


def test_three_lines_are_added() -> None:
    lines = (EXAMPLES / "trl_client.py").read_text().splitlines()
    ours = [line for line in lines if "fedlora." in line or line.startswith("import fedlora")]
    assert [line for line in lines if "# added" in line] == ours and len(ours) == 3
