"""What a run leaves of each round for people and programs: a row of metrics, and arrays beside it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from fedlora.disk import write_whole
from fedlora.errors import BadInput
from fedlora.summary import read_rows
from fedlora.types import Diagnostics

Row = dict[str, Any]


class Record:
    """metrics.jsonl and arrays/ of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metrics, self.arrays = folder, folder / "metrics.jsonl", folder / "arrays"

    def rows(self) -> list[Row]:
        """The rows so far."""
        return read_rows(self.folder)

    def cut(self, round: int) -> None:
        """Forget the rows after `round`: they will be played again. BadInput where rows before it are missing."""
        kept = self.rows()[:round]
        if len(kept) < round:
            raise BadInput(f"{self.metrics} is damaged: it ends with round {len(kept)}, and the checkpoint is of round {round}")
        write_whole(self.metrics, "".join(map(_line, kept)).encode())

    def add(self, row: Mapping[str, Any], diagnostics: Diagnostics) -> Row:
        """Append a round. Plain diagnostics join the row; tensors go to arrays/round-NNNNN.safetensors."""
        whole = self._whole(row, diagnostics)
        with open(self.metrics, "a") as file:
            file.write(_line(whole))
            file.flush()
            os.fsync(file.fileno())
        return whole

    def correct(self, row: Mapping[str, Any], diagnostics: Diagnostics) -> Row:
        """The same instead of the last round, of which there is more to say now."""
        whole = self._whole(row, diagnostics)
        write_whole(self.metrics, "".join(map(_line, [*self.rows()[:-1], whole])).encode())
        return whole

    def _whole(self, row: Mapping[str, Any], diagnostics: Diagnostics) -> Row:
        tensors = {name: x.contiguous() for name, x in diagnostics.items() if isinstance(x, Tensor)}
        whole: Row = clean(dict(row) | {name: x for name, x in diagnostics.items() if name not in tensors})
        if tensors:
            self.arrays.mkdir(exist_ok=True)
            write_whole(self.arrays / f"round-{row['round']:05d}.safetensors", save(tensors))
        return whole


def clean(x: Any) -> Any:
    """JSON has no nan: it becomes null."""
    if isinstance(x, float) and not math.isfinite(x):
        return None
    if isinstance(x, Mapping):
        return {k: clean(v) for k, v in x.items()}
    return [clean(v) for v in x] if isinstance(x, list | tuple) else x


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
