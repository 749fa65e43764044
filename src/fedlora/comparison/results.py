"""The results of a comparison as data: a row a cell, ours beside the published number of the same setting."""

import json
from pathlib import Path
from typing import Any

from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Grid
from fedlora.comparison.recipe import Recipe
from fedlora.disk import write_whole
from fedlora.report.runs import published_row
from fedlora.summary import diverged

Row = dict[str, Any]

MEASURED = {  # column -> where it stands in a run's summary
    "accuracy": ("final", "accuracy"),
    "macro_f1": ("final", "macro_f1"),
    "commonest_accuracy": ("final", "commonest_accuracy"),
    "validation_accuracy": ("final", "validation_accuracy"),
    "held_out_accuracy": ("held_out", "accuracy"),
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
DIVERGED = "it diverged: nothing that clients sent in its last round could be used"
COMPARED = ("published_accuracy", "published_spread", "published_upload_params", "difference")


def rows(grid: Grid, recipe: Recipe, folder: Folder) -> list[Row]:
    """A row for each cell that is done or has failed, in the recipe's order: the keys in which cells differ, how it went, what was
    measured, and the published numbers of this setting where there are any. Scores are of `round`, which validation chose or which
    is the last; `personal` says that they are of each client's own model on its own test examples. Shares are of 1, published ones
    too; `difference` is ours less the published accuracy. What does not apply is None. A cell that diverged has failed, and has no
    scores. There are no times, so one seed gives one table."""
    found = []
    for cell in sorted(grid.cells, key=lambda cell: cell.place):
        summary, failure = folder.summary(cell), folder.failure(cell)
        if summary is not None and diverged(summary["final"]):
            summary, failure = None, DIVERGED
        if summary is None and failure is None:
            continue
        row: Row = {key: cell.flat.get(key) for key in grid.varied}
        row |= {"hash": cell.hash, "status": "failed" if summary is None else "done", "error": failure if summary is None else None}
        row["personal"] = None if summary is None else bool(summary.get("clients"))
        row |= {name: (summary or {}).get(part, {}).get(key) for name, (part, key) in MEASURED.items()}
        theirs = published_row(recipe.published, cell.config) or {}
        row["published_accuracy"], row["published_spread"] = (_share(theirs.get(name)) for name in ("accuracy", "spread"))
        row["published_upload_params"] = theirs.get("upload_params")
        both = row["accuracy"] is not None and row["published_accuracy"] is not None
        row["difference"] = row["accuracy"] - row["published_accuracy"] if both else None
        found.append(row)
    return found


def write(found: list[Row], varied: tuple[str, ...], path: Path) -> None:
    """Write results.parquet; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, Any] = {}
    columns: dict[str, list[Any]] = {}
    for key in varied:
        columns[key], types[key] = _column([row[key] for row in found])
    for key in ("hash", "status", "error", "personal"):
        columns[key], types[key] = [row[key] for row in found], pa.bool_() if key == "personal" else pa.string()
    for key in (*MEASURED, *COMPARED):
        columns[key], types[key] = [row[key] for row in found], pa.int64() if key in COUNTS else pa.float64()
    table = pa.table({key: pa.array(values, types[key]) for key, values in columns.items()})
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


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
