"""wandb and mlflow themselves, in an environment beside `.venv` that has them."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import side

from fedlora.summary import read_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def python() -> Path:
    return side.python("track", side.extra("wandb", "mlflow"))


@pytest.fixture
def tables(bert_folder: Path, csv_folder: Path) -> dict[str, Any]:
    return {
        "precision": "fp32",
        "method": {"name": "lora-a2"},
        "model": {"source": str(bert_folder)},
        "data": {"source": str(csv_folder), "alpha": 1.0},
        "clients": {"count": 4, "rank": 2},
        "train": {"rounds": 3, "batch_size": 8, "lr": 5e-3},
    }


@pytest.fixture
def play(python: Path, tables: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Plays a run in the side environment: started, and stopped after the first round, and resumed."""

    def run(seconds: float = 60.0, environment: dict[str, str] | None = None, **track: Any) -> dict[str, Any]:
        configs = [tables | {"track": track}] * 2
        job = {"configs": configs, "out": str(tmp_path / "run"), "stops": [1, None], "seconds": seconds}
        given = {key: x for key, x in side.environment(side.ROOT / "tests").items() if not key.startswith(("WANDB", "MLFLOW"))}
        done = subprocess.run(
            [python, Path(__file__).with_name("play_tracked.py"), json.dumps(job)],
            env=given | (environment or {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)  # a tracker prints nothing there
        assert done.stderr == "" and found["same"]
        assert {file.name for file in tmp_path.iterdir()} == {"run"}  # and leaves nothing elsewhere
        return found

    return run


def rows_of(out: Path) -> dict[str, dict[int, float]]:
    """Key -> round -> number, of metrics.jsonl."""
    found: dict[str, dict[int, float]] = {}
    for row in read_rows(out):
        for key, value in row.items():
            if isinstance(value, int | float) and key != "round":
                found.setdefault(key, {})[row["round"]] = value
    return found


OWN = ("ranks/", "final/", "totals/", "_")


def test_an_offline_run_of_wandb_holds_every_round_once(play: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = play(to=["wandb"], project="tests", name="mine")
    assert not [note for note in found["notes"] if "wandb" in note]
    (first, early), (second, late) = found["wandb"]
    # offline-run-TIME-ID, and -1 behind that of a second one within the same second.
    assert first.split("-")[3] == second.split("-")[3]
    assert [row["_step"] for row in (*early, *late)] == [1, 2, 3]
    told: dict[str, dict[int, float]] = {}
    for row in (*early, *late):
        assert sum(x for name, x in row.items() if name.startswith("ranks/")) == pytest.approx(24)
        for name, x in row.items():
            if not name.startswith(OWN):
                told.setdefault(name.rpartition("/")[2], {})[row["_step"]] = x
    assert told == rows_of(tmp_path / "run")


def test_mlflow_goes_on_with_its_run_in_its_data_base(play: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = play(to=["mlflow"], project="tests", name="mine")
    assert not [note for note in found["notes"] if "mlflow" in note]
    (run,) = found["mlflow"]
    assert (run["name"], run["status"]) == ("mine", "FINISHED")
    assert run["params"]["method.name"] == "lora-a2" and run["params"]["train.rounds"] == "3"
    told = {name.rpartition("/")[2]: xs for name, xs in run["metrics"].items() if not name.startswith(OWN)}
    assert {name: dict(xs) for name, xs in told.items()} == rows_of(tmp_path / "run")
    assert all(len(dict(xs)) == len(xs) for xs in told.values())
    for step in (1, 2, 3):
        chosen = [dict(xs)[step] for name, xs in run["metrics"].items() if name.startswith("ranks/")]
        assert sum(chosen) == pytest.approx(24) and len(chosen) == 12
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run["metrics"]["final/accuracy"] == [[3, summary["final"]["accuracy"]]]
    assert json.loads(run["tags"]["summary.3"]) == summary


@pytest.mark.parametrize(
    ("track", "environment"),
    [
        ({"to": ["mlflow"], "uri": "http://127.0.0.1:9"}, {}),
        ({"to": ["wandb"], "mode": "online"}, {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "a"}),
    ],
    ids=["mlflow", "wandb"],
)
def test_a_dead_server_is_said_once_a_start(
    track: dict[str, Any], environment: dict[str, str], play: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Nothing listens on port 9. The process ends, too, where by itself the package would go on trying for minutes."""
    (name,) = track["to"]
    found = play(seconds=2.0, environment=environment, **track)
    said = [note for note in found["notes"] if name in note]
    assert len(said) == 2 and all(note.startswith(f"{name} has not answered") for note in said)
    assert len(read_rows(tmp_path / "run")) == 3 and (tmp_path / "run" / "summary.json").exists()
