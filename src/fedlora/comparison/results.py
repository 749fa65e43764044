"""The results of a comparison as data: a row a cell, ours beside the published number of the same setting."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell, Grid
from fedlora.comparison.recipe import Recipe
from fedlora.disk import write_whole
from fedlora.report.runs import published_row
from fedlora.summary import diverged
from fedlora.tasks.metrics import CLASSIFICATION, Metric

Row = dict[str, Any]

PLAIN = {  # column -> where it stands in a run's summary, of every task
    "round": ("written", "round"),
    "loss": ("final", "loss"),
    "worst_tenth": ("clients", "worst_tenth"),
    "failed_replies": ("totals", "failed"),
    "upload_params": ("totals", "upload_params"),
    "upload_bytes": ("totals", "upload_bytes"),
    "download_params": ("totals", "download_params"),
    "download_bytes": ("totals", "download_bytes"),
}
COUNTS = {"round", "failed_replies", "upload_params", "upload_bytes", "download_params", "download_bytes"}
TEXTS = {"hash", "status", "error", "metric"}
DIVERGED = "it diverged: nothing that clients sent in its last round could be used"
Metrics = tuple[Metric, ...]


def measured(metrics: Metrics) -> dict[str, tuple[str, str]]:
    """Column -> where it stands in the summary of a run of these metrics."""
    first = metrics[0].name
    scores = [*(metric.name for metric in metrics), *filter(None, [metrics[0].baseline]), f"validation_{first}"]
    return {name: ("final", name) for name in scores} | {f"held_out_{first}": ("held_out", first)} | PLAIN


def columns(known: Sequence[Metrics]) -> tuple[str, ...]:
    """What is measured of runs of these metrics and compared with published numbers; last the score that a run is compared by."""
    scores = [name for metrics in known for name in measured(metrics) if name not in PLAIN]
    published = [f"published_{metrics[0].name}" for metrics in known]
    compared = (*published, "published_spread", "published_upload_params", "difference")
    return tuple(dict.fromkeys((*scores, *PLAIN, *compared, "metric", "score")))


def metrics(grid: Grid, folder: Folder) -> tuple[Metrics, ...]:
    """Those of the runs that have begun, all different; of classification where none has."""
    found = dict.fromkeys(of for cell in _in_order(grid) if (of := folder.metrics(cell)))
    return tuple(found) or (CLASSIFICATION,)


def rows(grid: Grid, recipe: Recipe, folder: Folder) -> list[Row]:
    """A row for each cell that is done or has failed, in the recipe's order: the keys in which cells differ, how it went, what was
    measured, and the published numbers of this setting where there are any. Scores are of `round`, which validation chose or which
    is the last; `personal` says that they are of each client's own model on its own test examples. Shares are of 1, published ones
    too; `difference` is our score less the published one. What does not apply is None. A cell that diverged has failed, and has no
    scores. There are no times, so one seed gives one table."""
    found = []
    known = metrics(grid, folder)
    for cell in _in_order(grid):
        summary, failure = folder.summary(cell), folder.failure(cell)
        if summary is not None and diverged(summary["final"]):
            summary, failure = None, DIVERGED
        if summary is None and failure is None:
            continue
        row: Row = {key: cell.flat.get(key) for key in grid.varied}
        row |= {"hash": cell.hash, "status": "failed" if summary is None else "done", "error": failure if summary is None else None}
        row["personal"] = None if summary is None else bool(summary.get("clients"))
        own = folder.metrics(cell) or (known[0] if len(known) == 1 else None)
        row |= dict.fromkeys(columns(known)) | _of_run(summary or {}, own, published_row(recipe.published, cell.config) or {})
        found.append(row)
    return found


def _in_order(grid: Grid) -> list[Cell]:
    return sorted(grid.cells, key=lambda cell: cell.place)


def _of_run(summary: Mapping[str, Any], own: Metrics | None, theirs: Mapping[str, Any]) -> Row:
    """What is known of a run by its own metrics; nothing of one that failed before it had any among runs of different ones."""
    if own is None:
        return {}
    first = own[0]
    row = {name: summary.get(part, {}).get(key) for name, (part, key) in measured(own).items()}
    published, spread = (None if (x := theirs.get(name)) is None else x / first.points(1.0) for name in (first.name, "spread"))
    row |= {f"published_{first.name}": published, "published_spread": spread}
    score = row[first.name]
    row["published_upload_params"] = theirs.get("upload_params")
    row["difference"] = score - published if score is not None and published is not None else None
    return row | {"metric": first.name, "score": score}


def write(found: list[Row], varied: tuple[str, ...], path: Path) -> None:
    """Write results.parquet; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, Any] = {}
    values: dict[str, list[Any]] = {}
    for key in varied:
        values[key], types[key] = _column([row[key] for row in found])
    told = ("hash", "status", "error", "personal")
    others = [key for key in found[0] if key not in {*varied, *told}] if found else columns((CLASSIFICATION,))
    for key in (*told, *others):
        kind = pa.bool_() if key == "personal" else pa.string() if key in TEXTS else pa.int64() if key in COUNTS else pa.float64()
        values[key], types[key] = [row[key] for row in found], kind
    table = pa.table({key: pa.array(each, types[key]) for key, each in values.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_whole(path, sink.getvalue().to_pybytes())


def _column(values: list[Any]) -> tuple[list[Any], Any]:
    """A key's values and their type: whole numbers, numbers or booleans where all are, and text otherwise, lists as JSON."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return values, pa.bool_()
    if kinds == {int}:
        return values, pa.int64()
    if kinds and kinds <= {int, float}:
        return values, pa.float64()
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values], pa.string()
