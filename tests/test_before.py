"""Folders that an earlier version left are read, reported, exported and gone on with (`tests/fixtures/make.py` made them).

Numbers differ between processors, so they hold to 1e-5 here, and runs go on with the matrix instructions that every x86 processor
has: AdamW makes of a gradient near zero a step of full length, whose sign rounding chooses. That two versions give the same bits
is seen on one machine.
"""

import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fedlora.summary import read_rows

FIXTURES = Path(__file__).parent / "fixtures"
spec = importlib.util.spec_from_file_location("make", FIXTURES / "make.py")
assert spec is not None and spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

ROUND_LEFT_DOWN = {"flora", "lora-a2"}  # a download says no longer which round it is: a few bytes less
TIMES = {"wall_s", "train_s", "evaluate_s", "aggregate_s", "wire_s", "other_s"}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The console script in a copy of the fixtures."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("golden", "*.py"))
    return tiny.console(monkeypatch, capsys, tmp_path)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{key: x for key, x in row.items() if key not in TIMES} for row in read_rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the adapter or the model; a model that depends on its input has neither."""
    return {
        name: x
        for file in [*folder.glob("*model.safetensors"), *folder.glob("*/*model.safetensors")]
        for name, x in load_file(file).items()
    }


def close(found: Any, expected: Any) -> bool:
    """Equal but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], x) for key, x in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(close(a, b) for a, b in zip(found, expected, strict=True))
    return found == (pytest.approx(expected, rel=1e-5, abs=1e-5) if isinstance(expected, float) else expected)


def in_part(names: Iterable[str], *fast: str) -> list[Any]:
    """These names, those that are not `fast` in the slow suite."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in sorted(names)]


@pytest.mark.parametrize("name", in_part(make.RUNS, "lora-a2"))
def test_a_run_is_reported(name: str, call: Any, tmp_path: Path) -> None:
    status, _, err = call("report", name, "--html", f"{name}.html")
    assert status == 0, err
    assert (tmp_path / f"{name}.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", in_part({*make.RUNS} - {make.STOPPED}, "pfedloru", "fl-tac", "flora"))
def test_a_run_answers_and_is_exported(name: str, call: Any, tmp_path: Path) -> None:
    personal = ["--client", "0"] if "client_accuracy" in rows(FIXTURES / name)[-1] else []
    domain = ["--domain", "other"] if name == "fl-tac" else []
    status, out, err = call("predict", name, "w1 apple w2", *personal, *domain)
    assert status == 0 and out.split()[0] in (*tiny.CLASSES, "other/other"), err
    status, out, err = call("export", name, "--to", "there", *personal)
    if status:  # only where no adapter can hold the model
        assert status == 2 and name in ("feddpa", "fedlease", "fl-tac") and "for each input" in err
    else:
        assert weights(tmp_path / "there") and "note:" not in out
        assert not personal or "note: clients end with models of their own here" in call("export", name, "--to", "all")[1]


@pytest.mark.parametrize("name", in_part(make.RUNS, "lora-a2", "pfedloru"))
def test_a_run_goes_on(name: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, to in {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "1",
    }.items():  # read once, as a process starts
        monkeypatch.setenv(key, to)
    last = str(make.RUNS[name][1])
    make.call(tmp_path, "run", "--method", name, "--rounds", last, "--out", name, *make.settings(name), "--resume", "--quiet")
    golden = FIXTURES / "golden" / name
    for found, expected in zip(rows(tmp_path / name), rows(golden), strict=True):
        for key in (key for key in expected if not (name in ROUND_LEFT_DOWN and key.startswith("download"))):
            assert close(found[key], expected[key]), f"round {expected['round']}, {key}: {found[key]}, expected {expected[key]}"
    found, expected = weights(tmp_path / name), weights(golden)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        torch.testing.assert_close(found[key], x, rtol=1e-4, atol=1e-5)


def test_a_comparison_goes_on_with_the_one_cell_that_it_lacks(call: Any, tmp_path: Path) -> None:
    cells = tmp_path / "comparison" / "cells"
    before = {file: file.stat().st_mtime_ns for file in cells.rglob("*") if file.is_file()}
    assert len(list(cells.iterdir())) == 3
    status, _, err = call("compare", "before.toml", "--out", "comparison", "--jobs", "1")
    assert status == 0, err
    assert len(list(cells.iterdir())) == 4
    touched = [file for file, when in before.items() if file.stat().st_mtime_ns != when]
    assert not touched
