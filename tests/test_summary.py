"""What a run says of itself: the round whose model is the result, and files that are damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import BadInput
from fedlora.summary import (
    advice,
    best_round,
    complete,
    diverged,
    exhausted,
    in_words,
    read,
    read_metrics,
    read_rows,
    rounds,
    summarise,
    to_written,
)
from fedlora.tasks.metrics import CLASSIFICATION, Metric

TRAFFIC = ["upload_params", "upload_bytes", "download_params", "download_bytes"]
SECONDS = [f"{part}_s" for part in ("wall", "train", "evaluate", "aggregate", "wire", "other")]
ACCURACY = CLASSIFICATION[0]
PLAYED: dict[str, Any] = dict.fromkeys([*TRAFFIC, *SECONDS, "failed"], 1)


def rows(*validation: float | None) -> list[dict[str, Any]]:
    """Rows whose test accuracy falls, so that the best on the test set is always the first."""
    return [
        PLAYED
        | {"round": t, "accuracy": 1 - t / 10, "metric": "accuracy", "score": 1 - t / 10, "macro_f1": 0.5, "loss": 1.0}
        | ({} if score is None else {"validation_accuracy": score})
        for t, score in enumerate(validation, start=1)
    ]


def test_the_result_is_the_best_by_validation_the_first_of_equals_and_never_by_the_test_set() -> None:
    found = rows(0.2, 0.7, None, 0.7, 0.6)
    assert best_round(found, ACCURACY) == 2 and len(to_written(found, ACCURACY)) == 2
    summary = summarise(found, CLASSIFICATION)
    assert summary["written"] == {"round": 2, "by": "validation"} and summary["rounds"] == 5
    assert summary["final"]["accuracy"] == 0.8 and summary["final"]["validation_accuracy"] == 0.7
    assert summary["totals"]["upload_bytes"] == 5
    without = summarise(rows(None, None, None), CLASSIFICATION)
    assert without["written"] == {"round": 3, "by": "last"} and without["final"]["accuracy"] == pytest.approx(0.7)
    assert "best" not in without and rounds(without) == "3 rounds" and rounds(summary) == "round 2 of 5"


def test_patience_counts_scored_rounds_since_the_best() -> None:
    assert not exhausted(rows(0.2, 0.7, 0.1), 2, ACCURACY)
    assert not exhausted(rows(0.2, 0.7, 0.1, None, None), 2, ACCURACY)
    assert exhausted(rows(0.2, 0.7, 0.1, None, 0.7), 2, ACCURACY)
    assert (
        not exhausted(rows(0.2, 0.7, 0.1, 0.1, 0.1), None, ACCURACY)
        and not exhausted(rows(None, None), 1, ACCURACY)
        and not exhausted([], 1, ACCURACY)
    )


def test_where_lower_is_better_the_result_is_the_lowest() -> None:
    error = Metric("mse", "mean squared error", unit="", better="lower", baseline="constant_mse", constant="the mean")
    found = [{"round": t, "validation_mse": score} for t, score in enumerate((0.4, 0.2, 0.2, 0.3), start=1)]
    assert best_round(found, error) == 2 and exhausted(found, 2, error) and not exhausted(found, 3, error)
    final = {"score": 0.25, "mse": 0.25, "validation_mse": 0.2, "constant_mse": 0.24}
    assert in_words({"final": final}, [error]) == "mean squared error 0.25  validation 0.2  mean 0.24"
    assert list(advice([], {"final": final, "written": {"round": 4}}, error)) == ["no better than always answering the mean"]


def test_only_a_model_that_says_nothing_has_diverged() -> None:
    assert diverged({"loss": None}) and diverged({"loss": 1.0, "undecided": 5, "examples_scored": 5, "score": 0.0})
    assert not diverged({"loss": 1.0, "undecided": 1, "examples_scored": 5, "score": 0.0})  # an error of nothing, but for one
    assert diverged({"loss": 1.0, "undecided": 1, "score": 0.0}) and not diverged(
        {"loss": 1.0, "score": 0.0}
    )  # of earlier versions


def test_a_folder_without_metrics_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "federation.json").write_text('{"metrics": []}')
    with pytest.raises(BadInput, match="missing or damaged"):
        read_metrics(tmp_path)


def test_a_run_that_is_out_of_patience_is_complete_and_one_that_was_told_to_stop_is_not() -> None:
    assert complete({"rounds": 3}, 3, None) and not complete({"rounds": 3}, 4, None)
    early = {"rounds": 3, "stopped_early": True}  # as earlier versions have it
    assert complete(early, 4, 2) and not complete(early, 4, None)
    assert complete({**early, "out_of_patience": True}, 4, 2) and not complete({**early, "out_of_patience": False}, 4, 2)


def test_scores_in_words() -> None:
    final = {"score": 0.5, "accuracy": 0.5, "validation_accuracy": 0.625, "macro_f1": None, "commonest_accuracy": 0.25, "loss": 1.0}
    assert in_words({"final": final}, CLASSIFICATION) == "accuracy 50.0 %  validation 62.5 %  macro F1 -  commonest class 25.0 %"
    assert in_words({"final": {"score": None}}, CLASSIFICATION) == "accuracy -"
    personal = {"final": {"score": 0.5}, "clients": {"worst_tenth": 0.25}}
    assert in_words(personal, CLASSIFICATION) == "accuracy of clients' own models 50.0 %"


def test_advice() -> None:
    falling = [row | {"loss": 1 / row["round"]} for row in rows(*[None] * 8)]
    summary = summarise(falling, CLASSIFICATION)
    assert list(advice(falling, summary, ACCURACY)) == ["the training loss still falls, so more rounds may help"]
    poor = summary | {"final": summary["final"] | {"commonest_accuracy": 0.2}}
    assert "no better than always answering the commonest class" in list(advice(falling, poor, ACCURACY))
    assert not list(advice(rows(*[None] * 8), summary, ACCURACY))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"round": 1}\n{"rou\n{"round": 3}\n', 2),
        ('{"round": 1}\n{"round": 3}\n', 2),
        ("[]\n", 1),
        ('{"round": 1}\n\n{"round": 2}\n', 2),
        ("\0\0\0\n", 1),
    ],
)
def test_a_damaged_row_is_named(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(BadInput, match=rf"metrics.jsonl is damaged: line {line} is not the row of round {line}"):
        read_rows(tmp_path)


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2')
    assert read_rows(tmp_path) == [{"round": 1, "metric": "accuracy", "score": None}]


def test_a_key_of_an_earlier_version_is_read_by_its_name_of_today(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "accuracy": 0.5, "task_accuracy": {"a": 0.5}}\n')
    now = {"metric": "accuracy", "score": 0.5}  # what earlier versions did not say
    assert read_rows(tmp_path) == [{"round": 1, "accuracy": 0.5, "domain_accuracy": {"a": 0.5}, **now}]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"rounds": 3}', "\xff"])
def test_a_damaged_summary_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadInput, match=r"summary.json is damaged; delete it"):
        read(tmp_path)


def test_no_summary_and_a_whole_one(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    whole = {"rounds": 3, "final": {"accuracy": None}}
    (tmp_path / "summary.json").write_text(json.dumps(whole))
    assert read(tmp_path) == {"rounds": 3, "final": {"accuracy": None, "metric": "accuracy", "score": None}}
