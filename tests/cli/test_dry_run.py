"""`fedlora run --dry-run` says what the run then is, and writes nothing."""

import re
from pathlib import Path

import pytest
import tiny

from fedlora.runs.dry import over_all
from fedlora.summary import read_rows


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from fedlora.comparison import run
    from fedlora.report import split

    monkeypatch.setattr(split, "plot_split", lambda parts, dataset, path: None)
    monkeypatch.setattr(run, "write_report", lambda paths, html: None)
    return tiny.console(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("more", [["--method", "fedit"], ["--method", "rolora", "--set", "model.head=shared"]], ids=lambda x: x[1])
def test_it_says_the_bytes_of_the_run(more: list[str], fedlora, bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    """Of five rounds, of which four are played with made-up training; RoLoRA sends one factor a round, in turn."""
    args = ["run", "--model", bert_folder, "--data", csv_folder, "--clients", "3", "--rank", "2", "--alpha", "9", *more]
    status, said, err = fedlora(*args, "--rounds", "5", "--dry-run")
    assert status == 0 and not list(tmp_path.iterdir()), err
    assert fedlora(*args, "--rounds", "5", "--out", "one", "--quiet")[0] == 0
    rows = read_rows(tmp_path / "one")
    up, down = (float(x) for x in re.search(r"in all +up ([\d.]+) MB +down ([\d.]+) MB, 5 rounds", said).groups())
    assert up == pytest.approx(sum(row["upload_bytes"] for row in rows) / 1e6, abs=0.0051)
    assert down == pytest.approx(sum(row["download_bytes"] for row in rows) / 1e6, abs=0.0051)
    assert "90 training and 45 test texts of 3 classes" in said and "3, 3 a round" in said
    assert re.search(r"time +about \d+ seconds: \d+ texts a second in training, \d+ in scoring", said)


def test_what_fedit_trains_is_both_factors_of_every_layer(fedlora, bert_folder: Path, csv_folder: Path) -> None:
    """Two blocks of four 16 x 16 layers, one 16 to 40 and one 40 to 16, at rank 2: 2 * (4 * 32 + 2 * 56) * 2 = 960."""
    _, said, _ = fedlora("run", "--model", bert_folder, "--data", csv_folder, "--rank", "2", "--method", "fedit", "--dry-run")
    assert "960 parameters a client, on 12 layers, rank 2, head frozen" in said


def test_later_rounds_are_like_the_last_two() -> None:
    assert over_all([1.0, 2.0, 4.0, 6.0], 3) == 7.0
    assert over_all([1.0, 2.0, 4.0, 6.0], 7) == 13.0 + 3 * 5.0
    assert over_all([3.0], 1) == 3.0


def test_what_the_run_would_refuse_is_refused(fedlora, bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    status, out, err = fedlora("run", "--model", bert_folder, "--data", csv_folder, "--rank", "17", "--dry-run", "--quiet")
    assert status == 2 and not out and "17 is above 16" in err and not list(tmp_path.iterdir())
