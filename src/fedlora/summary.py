"""What a run says of itself in its folder: metrics.jsonl, a row a round, and summary.json once it is complete."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import BadInput
from fedlora.scores import no_better, still_falling

Row = Mapping[str, Any]

SCORES = (
    *("accuracy", "macro_f1", "commonest_accuracy", "undecided", "clients_untrained", "validation_accuracy"),
    *("validation_macro_f1", "loss"),
)
TOTALS = ("upload_params", "upload_bytes", "download_params", "download_bytes")
OLD = {"task_accuracy": "domain_accuracy"}  # keys in rows of earlier versions -> what they are called now
SECONDS = ("wall_s", "train_s", "evaluate_s", "aggregate_s", "wire_s", "other_s")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one for each round from 1 on; empty when there is none yet. A last line without an end, which a
    kill leaves, does not count.

    Raises:
        BadInput: a line is damaged; it is named.
    """
    file = folder / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.exists() else (), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = _by_names_of_today(dict(json.loads(line)))
            whole = row["round"] == number
        except (ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            raise BadInput(f"{file} is damaged: line {number} is not the row of round {number}")
        rows.append(row)
    return rows


def _by_names_of_today(row: Row) -> dict[str, Any]:
    return {OLD.get(key, key): value for key, value in row.items()}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The scores of the round whose model is written, which round that is, and the totals of the run.

    The round is the best by validation where there is a validation part, else the last: never the best on the test set.
    """
    row = to_written(rows)[-1]
    return {
        "rounds": rows[-1]["round"],
        "final": {name: row[name] for name in SCORES if name in row},
        "written": {"round": row["round"], "by": "last" if best_round(rows) is None else "validation"},
        "totals": {name: sum(row[name] for row in rows) for name in (*TOTALS, *SECONDS, "failed")},
    }


def best_round(rows: Sequence[Row]) -> int | None:
    """The round with the best accuracy on the validation part, the first of equals; None where none was scored on one."""
    scored = {int(row["round"]): row["validation_accuracy"] for row in rows if row.get("validation_accuracy") is not None}
    return max(scored, key=scored.__getitem__) if scored else None


def to_written(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows up to the round whose model is the result: the best by validation, or the last."""
    return rows[: best_round(rows)]


def exhausted(rows: Sequence[Row], patience: int | None) -> bool:
    """Whether so many scored rounds have passed since the best one by validation."""
    best = best_round(rows)
    if patience is None or best is None:
        return False
    since = sum(row.get("validation_accuracy") is not None for row in rows[best:])
    return since >= patience


def read(folder: Path) -> dict[str, Any] | None:
    """The summary of a run folder; None where the run is not finished. BadInput when it is damaged."""
    file = folder / "summary.json"
    try:
        found = json.loads(file.read_bytes())
        if {"rounds", "final"} <= found.keys():
            return dict(found)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        pass
    raise BadInput(f"{file} is damaged; delete it, and fedlora run --resume --out {folder} writes it anew")


def diverged(scores: Row) -> bool:
    """Whether a round left no training loss that is a number, or a model that gives none."""
    return scores.get("loss", 0.0) is None or bool(scores.get("undecided") and not scores["accuracy"])


def complete(summary: Mapping[str, Any], rounds: int) -> bool:
    """Whether there is nothing left to play of so many rounds."""
    return bool(summary["rounds"] >= rounds or summary.get("stopped_early"))


def in_words(summary: Mapping[str, Any]) -> str:
    """The scores of a run, for its last line. `clients` is in the summary where each was scored with a model of its own."""
    final, whose = summary["final"], " of clients' own models" if "clients" in summary else ""
    words = [(f"accuracy{whose}", "accuracy"), ("validation", "validation_accuracy"), ("macro F1", "macro_f1")]
    said = [f"{name} {percent(final[key])}" for name, key in words if key in final]
    if final.get("commonest_accuracy") is not None:
        said.append(f"commonest class {percent(final['commonest_accuracy'])}")
    if "held_out" in summary:
        said.append(f"held-out clients {percent(summary['held_out']['accuracy'])}")
    if final.get("clients_untrained"):
        count = final["clients_untrained"]
        said.append(f"{count} client{'s have' if count > 1 else ' has'} not trained yet")
    if final.get("undecided"):
        said.append(f"no answer to {final['undecided']:,} texts")
    return "  ".join(said)


def advice(rows: Sequence[Row], summary: Mapping[str, Any]) -> Iterator[str]:
    """What a user should make of the scores."""
    final = summary["final"]
    if final["accuracy"] is not None and no_better(final["accuracy"], final.get("commonest_accuracy")):
        yield "no better than always answering the commonest class"
    if summary["written"]["round"] == len(rows) and still_falling([row["loss"] for row in rows]):
        yield "the training loss still falls, so more rounds may help"


def rounds(summary: Mapping[str, Any]) -> str:
    """After how many rounds the model is taken that is the result."""
    count, written = summary["rounds"], summary.get("written", {}).get("round", summary["rounds"])
    return f"{count} rounds" if written == count else f"round {written} of {count}"


def percent(share: float | None) -> str:
    """A share with one decimal; "-" where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"
