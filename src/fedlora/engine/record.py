"""What a run leaves for people and programs: a row of metrics a round, arrays beside it, and a summary."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from fedlora.engine.checkpoint import write_whole
from fedlora.types import Diagnostics

Row = dict[str, Any]


class Record:
    """metrics.jsonl and arrays/ of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.metrics, self.arrays = folder / "metrics.jsonl", folder / "arrays"

    def rows(self) -> list[Row]:
        """The whole rows so far; a last line that was cut off by a kill does not count."""
        return read_rows(self.metrics)

    def cut(self, round: int) -> None:
        """Forget the rows after `round`: they will be played again."""
        kept = [row for row in self.rows() if row["round"] <= round]
        write_whole(self.metrics, "".join(map(_line, kept)).encode())

    def add(self, row: Mapping[str, Any], diagnostics: Diagnostics) -> Row:
        """Append a round. Plain diagnostics join the row; tensors go to arrays/round-NNNNN.safetensors."""
        tensors = {name: x.contiguous() for name, x in diagnostics.items() if isinstance(x, Tensor)}
        whole: Row = clean(dict(row) | {name: x for name, x in diagnostics.items() if name not in tensors})
        if tensors:
            self.arrays.mkdir(exist_ok=True)
            write_whole(self.arrays / f"round-{row['round']:05d}.safetensors", save(tensors))
        with open(self.metrics, "a") as file:
            file.write(_line(whole))
            file.flush()
            os.fsync(file.fileno())
        return whole


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; empty when there is none yet."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith("\n"):
                rows.pop()
    return rows


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Final and best metrics and the totals of the run."""
    best = max(rows, key=lambda row: row["accuracy"] if row["accuracy"] is not None else -1.0)
    traffic = ("upload_params", "upload_bytes", "download_params", "download_bytes")
    totals = (*traffic, "wall_s", "train_s", "evaluate_s", "aggregate_s", "wire_s", "other_s")
    return {
        "rounds": rows[-1]["round"],
        "final": {name: rows[-1][name] for name in ("accuracy", "macro_f1", "loss")},
        "best": {name: best[name] for name in ("round", "accuracy", "macro_f1")},
        "totals": {name: sum(row[name] for row in rows) for name in totals} | {"failed": sum(row["failed"] for row in rows)},
    }


def clean(x: Any) -> Any:
    """JSON has no nan: it becomes null."""
    if isinstance(x, float) and not math.isfinite(x):
        return None
    if isinstance(x, Mapping):
        return {k: clean(v) for k, v in x.items()}
    return [clean(v) for v in x] if isinstance(x, list | tuple) else x


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
