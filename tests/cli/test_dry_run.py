"""`fedlora run --dry-run` says what the run then is, and writes nothing."""

import json
import re
from pathlib import Path

import architectures
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


def test_answers_that_are_written_take_their_time(
    fedlora, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a language model is scored by what it writes, the measured examples are written, too."""
    from fedlora.training import score

    place = tmp_path_factory.mktemp("place")
    model, tokenizer = architectures.causal("llama")
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    rows = [json.dumps({"question": f"{i} and 1?", "answer": f"{i + 1}!"}) for i in range(40)]
    (place / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    asked, real = [], score.generate
    monkeypatch.setattr(score, "generate", lambda model, prompts, *rest: asked.append(len(prompts)) or real(model, prompts, *rest))
    sets = ("task.metrics=['exact_match']", "task.max_new_tokens=4", "data.partition=iid")
    status, said, err = fedlora(
        *("run", "--task", "causal_lm", "--model", place / "base", "--data", place / "pairs.jsonl", "--clients", "2", "--dry-run"),
        *(x for each in sets for x in ("--set", each)),
    )
    assert status == 0 and "in scoring" in said, err
    assert asked and asked[0] == 8
