"""trl's SFTTrainer as a client, in an environment beside `.venv` that has trl: `.venv-trl`, made when it is missing or older than
pyproject.toml."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import fedlora

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIDE = ROOT / ".venv-trl"


@pytest.fixture(scope="module")
def python() -> Path:
    """Python of the side environment: what `.venv` has, and trl on top."""
    ready, made = SIDE / ".ready", SIDE / "bin" / "python"
    if not ready.exists() or ready.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        subprocess.run([sys.executable, "-m", "venv", SIDE], check=True)
        (site,) = SIDE.glob("lib/python*/site-packages")
        (site / "beside.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
        pip = [made, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *extras["trl"]]
        done = subprocess.run(pip, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ready.touch()
    return made


def run(python: Path, script: Path, place: Path, *arguments: str) -> str:
    path = os.pathsep.join(map(str, (Path(fedlora.__file__).parents[1], ROOT / "tests", ROOT / "examples")))
    done = subprocess.run(
        [python, script, *arguments], env=os.environ | {"PYTHONPATH": path}, cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_sft_trainers_give_the_adapter_of_plain_training_and_a_mean_by_hand(python: Path, tmp_path: Path) -> None:
    out = run(python, Path(__file__).with_name("trl_federation.py"), tmp_path, str(tmp_path))
    found = json.loads(out.splitlines()[-1])
    assert found["off"] <= 1e-5 and found["off_in_models"] <= 1e-5 and found["moved"] > 1e-3, found
    assert found["rounds"] == [2, 2] and found["modules"] == 14 and found["loss"][1] < found["loss"][0]


def test_the_example_runs(python: Path, tmp_path: Path) -> None:
    assert "evaluation loss" in run(python, ROOT / "examples" / "trl_client.py", tmp_path)


def test_three_lines_are_added() -> None:
    lines = (ROOT / "examples" / "trl_client.py").read_text().splitlines()
    ours = [line for line in lines if "fedlora." in line or line.startswith("import fedlora")]
    assert [line for line in lines if "# added" in line] == ours and len(ours) == 3
