"""A run that cannot fit is refused in one line, and only then."""

from pathlib import Path

import pytest
import tiny

from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.models.memory import Part, Room
from fedlora.runs import fit, prepare

GB = 10**9
STEP = Part("activations", 3 * GB, sure=False)
BASE = Part("base as it was read", 2 * GB)


@pytest.mark.parametrize("free", [None, 5 * GB, 4 * GB, int(3.4 * GB)])
def test_what_may_fit_is_not_refused(free: int | None) -> None:
    """The sure part is 2 GB, the whole 5 GB: less than 1.5 times of 3.4 GB."""
    fit.refuse(resolve(), [BASE, STEP], Room(free), "cpu")


def test_what_cannot_fit_is_refused_with_advice() -> None:
    with pytest.raises(BadInput) as error:
        fit.refuse(resolve(), [BASE, STEP], Room(3 * GB), "cpu")
    assert str(error.value) == (
        "this run needs about 5.00 GB of main memory, and 3.00 GB are free (activations 3.00 GB, base as it was read 2.00 GB); "
        "possible: train.batch_size below 32, a smaller train.rows, data.max_length below 128, train.checkpointing = true"
    )
    with pytest.raises(BadInput) as error:
        fit.refuse(resolve(), [BASE, STEP], Room(int(1.9 * GB)), "cpu")
    assert "a smaller model" in str(error.value) and "\n" not in str(error.value)
    beside = Part("base as it was read", 2 * GB, computing=False)
    fit.refuse(resolve(), [beside], Room(GB, 3 * GB), "cuda")
    with pytest.raises(BadInput, match=r"of main memory, and 1\.00 GB are free"):
        fit.refuse(resolve(), [beside], Room(8 * GB, GB), "cuda")
    with pytest.raises(BadInput, match=r"of the GPU's memory, and 1\.00 GB are free"):
        fit.refuse(resolve(), [BASE], Room(GB, 8 * GB), "cuda")


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    return tiny.console(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize(
    "free, what", [(10_000, "base as it was read"), (60_000, "adapters and optimiser"), (300_000, "activations")]
)
def test_a_run_is_refused_before_anything_is_written(
    free: int, what: str, fedlora, bert_folder: Path, csv_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model has some 25 kB of parameters, its clients' adapters and steps some 100 kB each."""
    monkeypatch.setattr(prepare, "room", lambda device: Room(free))
    args = [
        "run",
        "--model",
        bert_folder,
        "--data",
        csv_folder,
        "--clients",
        "3",
        "--set",
        "precision=fp32",
        "--set",
        "data.max_length=64",
        "--out",
        "one",
    ]
    status, _, err = fedlora(*args, "--quiet", "--method", "fedit")
    assert status == 2 and len(err.splitlines()) == 1 and f"({what}" in err and "possible: " in err
    assert not (tmp_path / "one").exists()


def test_a_dry_run_says_what_each_part_takes(fedlora, bert_folder: Path, csv_folder: Path) -> None:
    args = ["run", "--model", bert_folder, "--data", csv_folder, "--clients", "3", "--dry-run", "--method", "fedit"]
    status, said, err = fedlora(*args)
    (line,) = [line for line in said.splitlines() if line.startswith("memory")]
    assert status == 0 and all(part in line for part in ("base as it was read", "adapters and optimiser", "activations ")), err
