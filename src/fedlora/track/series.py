"""From a run's rows and summary to the points that trackers are told.

    score/      every metric, its constant answer, validation_*, domain_*/DOMAIN; of clients' own scores mean, worst, and each
                where they are few
    loss        of training
    bytes/, params/, seconds/    what crossed the wire, and where the time went
    round/      clients, failed, and whatever else of a row is a number
    ranks/      by module, mean over clients: of methods that choose ranks
    failures    a text: who gave no reply that counts, and why

Names end in the keys of metrics.jsonl.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.tasks.metrics import Metric
from fedlora.track.base import Point, Run

MOST_CLIENTS = 32  # with a series each
CHOSEN = "ranks_chosen"  # (K, N, r), of K clients and N modules
ENDINGS = {"_bytes": "bytes", "_params": "params", "_s": "seconds"}

Row = Mapping[str, Any]


def of_round(row: Row, run: Run) -> Point:
    """The point of a row of metrics.jsonl. The arrays of its round are read from the run's folder."""
    scores = {name for metric in run.metrics for name in (metric.name, metric.baseline)} | {"score"}
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if key == "loss" and value is not None:
            numbers[key] = value
        elif _is_number(value) and key != "round":
            numbers[f"{_group(key, scores)}/{key}"] = value
        elif isinstance(value, Mapping) and key.startswith("domain_"):
            numbers |= {f"score/{key}/{name}": x for name, x in value.items() if _is_number(x)}
        elif isinstance(value, Mapping) and key.startswith("client_"):
            numbers |= dict(_of_clients(key, value, run))
    ranks = _ranks(run.folder / "arrays" / f"round-{row['round']:05d}.safetensors", run.modules)
    return Point(row["round"], numbers | ranks, _failures(row, run.clients))


def of_summary(summary: Row) -> Point:
    """The point of a run's summary: the scores of the round that was written, those of held-out clients, and the totals."""
    numbers = {
        f"{table}/{key}": value
        for table in ("final", "held_out", "totals")
        for key, value in summary.get(table, {}).items()
        if _is_number(value)
    }
    return Point(summary["rounds"], numbers, {"summary": json.dumps(summary, indent=1)})


def _group(key: str, scores: set[str]) -> str:
    if key in scores or key.startswith("validation_"):
        return "score"
    return next((group for ending, group in ENDINGS.items() if key.endswith(ending)), "round")


def _of_clients(key: str, by_client: Row, run: Run) -> Iterator[tuple[str, float]]:
    """Mean and worst of the clients' scores, and each where they are few."""
    metric = _metric(key, run.metrics)
    known = {int(id): score for id, score in by_client.items() if score is not None}
    if known:
        yield f"score/{key}_mean", float(np.mean(list(known.values())))
        yield f"score/{key}_worst", (max if metric.better == "lower" else min)(known.values())
    if len(by_client) <= MOST_CLIENTS:
        yield from ((f"{key}/{run.clients[id]}", score) for id, score in known.items())


def _metric(key: str, metrics: Sequence[Metric]) -> Metric:
    return next((metric for metric in metrics if key == f"client_{metric.name}"), metrics[0])


def _ranks(arrays: Path, modules: Sequence[str]) -> dict[str, float]:
    """Module -> how many of its ranks were chosen, mean over clients; nothing where the method chooses none."""
    from safetensors import safe_open

    if not arrays.exists():
        return {}
    with safe_open(arrays, "numpy") as file:
        chosen: Any = file.get_tensor(CHOSEN) if CHOSEN in file.keys() else np.zeros(0)  # noqa: SIM118
    if chosen.ndim != 3 or chosen.shape[1] != len(modules):
        return {}
    means = chosen.astype(bool).sum(2).mean(0)
    return {f"ranks/{module}": float(mean) for module, mean in zip(modules, means, strict=True)}


def _failures(row: Row, clients: Sequence[str]) -> dict[str, str]:
    lines = [f"{clients[int(id)]}: {why}" for id, why in row.get("failures", {}).items()]
    return {"failures": "\n".join(lines)} if lines else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
