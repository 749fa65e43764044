"""What a run says of itself in its folder: metrics.jsonl, a row a round, and summary.json once it is complete."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import BadInput
from fedlora.names import counted
from fedlora.scores import still_falling
from fedlora.tasks.metrics import CLASSIFICATION, Metric

Row = Mapping[str, Any]

SCORES = ("examples_scored", "undecided", "clients_untrained", "loss")  # beside the metrics
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
    found = {OLD.get(key, key): value for key, value in row.items()}
    first = CLASSIFICATION[0].name
    return found if "score" in found else found | {"metric": first, "score": found.get(first)}


def read_metrics(folder: Path) -> tuple[Metric, ...]:
    """The metrics of a run folder, the first being the one that runs are compared by. BadInput when federation.json is damaged."""
    file = folder / "federation.json"
    try:
        return metrics_of(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{file}: missing or damaged, so this is no run folder ({error})") from error


def metrics_of(federation: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Those that a federation.json names. TypeError or ValueError where it is damaged."""
    named = federation.get("metrics")
    if named is not None and not named:
        raise ValueError("no metric")
    return CLASSIFICATION if named is None else tuple(Metric(**each) for each in named)


def summarise(rows: Sequence[Row], metrics: Sequence[Metric]) -> dict[str, Any]:
    """The scores of the round whose model is written, which round that is, and the totals of the run.

    The round is the best by validation where there is a validation part, else the last: never the best on the test set.
    """
    row = to_written(rows, metrics[0])[-1]
    names = [name for metric in metrics for name in (metric.name, metric.baseline) if name]
    scores = ("metric", "score", *names, *(f"validation_{metric.name}" for metric in metrics), *SCORES)
    return {
        "rounds": rows[-1]["round"],
        "final": {name: row[name] for name in scores if name in row},
        "written": {"round": row["round"], "by": "last" if best_round(rows, metrics[0]) is None else "validation"},
        "totals": {name: sum(row[name] for row in rows) for name in (*TOTALS, *SECONDS, "failed")},
    }


def best_round(rows: Sequence[Row], metric: Metric) -> int | None:
    """The round with the best score on the validation part, the first of equals; None where none was scored on one."""
    best: tuple[int, float] | None = None
    for row in rows:
        score = row.get(f"validation_{metric.name}")
        if score is not None and (best is None or metric.ahead(score, best[1])):
            best = int(row["round"]), score
    return best and best[0]


def to_written(rows: Sequence[Row], metric: Metric) -> Sequence[Row]:
    """The rows up to the round whose model is the result: the best by validation, or the last."""
    return rows[: best_round(rows, metric)]


def exhausted(rows: Sequence[Row], patience: int | None, metric: Metric) -> bool:
    """Whether so many scored rounds have passed since the best one by validation."""
    best = best_round(rows, metric)
    if patience is None or best is None:
        return False
    since = sum(row.get(f"validation_{metric.name}") is not None for row in rows[best:])
    return since >= patience


def read(folder: Path) -> dict[str, Any] | None:
    """The summary of a run folder; None where the run is not finished. BadInput when it is damaged."""
    file = folder / "summary.json"
    try:
        found = json.loads(file.read_bytes())
        if {"rounds", "final"} <= found.keys():
            return {**found, "final": _by_names_of_today(found["final"])}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        pass
    raise BadInput(f"{file} is damaged; delete it, and fedlora run --resume --out {folder} writes it anew")


def diverged(scores: Row) -> bool:
    """Whether a round left no training loss that is a number, or a model that gives none."""
    return scores.get("loss", 0.0) is None or speechless(scores)


def speechless(scores: Row) -> bool:
    """Whether the model gave no finite numbers for any example. Rows of earlier versions do not say how many were scored."""
    undecided, scored = scores.get("undecided", 0), scores.get("examples_scored")
    return bool(undecided) and (not scores["score"] if scored is None else undecided >= scored)


def complete(summary: Mapping[str, Any], rounds: int, patience: int | None) -> bool:
    """Whether there is nothing left to play of so many rounds. A run that ended for lack of patience is over however many there
    are; one that was told to stop can go on. Earlier versions did not say which it was; without patience it was told."""
    return bool(summary["rounds"] >= rounds or summary.get("out_of_patience", summary.get("stopped_early") and patience))


def in_words(summary: Mapping[str, Any], metrics: Sequence[Metric]) -> str:
    """The scores of a run, for its last line. `clients` is in the summary where each was scored with a model of its own."""
    final, whose, first = summary["final"], " of clients' own models" if "clients" in summary else "", metrics[0]
    said = [f"{first.title}{whose} {first.text(final['score'])}"]
    constant, base = first.constant.removeprefix("the "), final.get(first.baseline)
    if base is not None and first.model:
        said[0] += f" ({constant} {first.number(base)})"
    if f"validation_{first.name}" in final:
        said.append(f"validation {first.text(final[f'validation_{first.name}'])}")
    said += [f"{metric.title} {metric.text(final[metric.name])}" for metric in metrics[1:] if metric.name in final]
    if base is not None and not first.model:
        said.append(f"{constant} {first.text(base)}")
    if "held_out" in summary:
        said.append(f"held-out clients {first.text(summary['held_out'][first.name])}")
    if final.get("clients_untrained"):
        count = final["clients_untrained"]
        said.append(f"{count} client{'s have' if count > 1 else ' has'} not trained yet")
    if final.get("undecided"):
        said.append(f"no answer to {final['undecided']:,} examples")
    return "  ".join(said)


def advice(rows: Sequence[Row], summary: Mapping[str, Any], metric: Metric) -> Iterator[str]:
    """What a user should make of the scores."""
    final = summary["final"]
    if final["score"] is not None and metric.no_better(final["score"], final.get(metric.baseline)):
        yield f"no better than {metric.answering}"
    if summary["written"]["round"] == len(rows) and still_falling([row["loss"] for row in rows]):
        yield "the training loss still falls, so more rounds may help"


def last_line(summary: Mapping[str, Any], metrics: Sequence[Metric]) -> str:
    """What a run says last: its scores, after how many rounds, what failed and what crossed the wire."""
    totals = summary["totals"]
    failed = f"failed replies {totals['failed']}  " if totals["failed"] else ""
    traffic = f"up {totals['upload_bytes'] / 1e6:.1f} MB  down {totals['download_bytes'] / 1e6:.1f} MB"
    return f"{in_words(summary, metrics)}  after {rounds(summary)}  {failed}{traffic}"


def rounds(summary: Mapping[str, Any]) -> str:
    """After how many rounds the model is taken that is the result."""
    count, written = summary["rounds"], summary.get("written", {}).get("round", summary["rounds"])
    return counted(count, "round") if written == count else f"round {written} of {count}"
