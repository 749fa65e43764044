"""What a comparison leaves on disk, and what can be read from there.

    OUT/recipe.toml, recipe.csv        the recipe at its scale, and its published numbers
    OUT/cells/<hash>/                  a run folder for each cell; the hash is that of its whole configuration
    OUT/failed/<hash>.txt              why a cell failed: a line, then the traceback; gone once it succeeds
    OUT/results.parquet, results.md    a row a cell, and the same for people
    OUT/report.html, figures/          the report

Folders of cells that the grid has no longer stay, and count for nothing.
"""

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.comparison.grid import Cell
from fedlora.comparison.recipe import Header, Recipe, read
from fedlora.disk import write_whole
from fedlora.errors import BadInput
from fedlora.summary import complete, read_metrics
from fedlora.summary import read as read_summary
from fedlora.tasks.metrics import CLASSIFICATION, Metric


@dataclass(frozen=True)
class Folder:
    """The folder of one comparison."""

    path: Path

    def run(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.path / "cells" / cell.hash

    def summary(self, cell: Cell) -> dict[str, Any] | None:
        """The summary of a cell that is complete."""
        found = read_summary(self.run(cell))
        train = cell.config.train
        return found if found is not None and complete(found, train.rounds, train.patience) else None

    def metrics(self, cell: Cell) -> tuple[Metric, ...] | None:
        """What a cell is scored by, the first being what it is compared by; None where its run has not begun."""
        run = self.run(cell)
        if (run / "federation.json").exists():
            return read_metrics(run)
        return CLASSIFICATION if run.exists() else None

    def failure(self, cell: Cell) -> str | None:
        """Why a cell failed when it was last tried, in one line."""
        file = self._failure(cell)
        return file.read_text().partition("\n")[0] if file.exists() else None

    def failed(self, cell: Cell, reason: str, error: BaseException | None = None) -> None:
        """Note down that a cell failed."""
        file = self._failure(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        trace = "".join(traceback.format_exception(error)) if error else ""
        write_whole(file, f"{reason}\n\n{trace}".encode())

    def succeeded(self, cell: Cell) -> None:
        """Forget an earlier failure."""
        self._failure(cell).unlink(missing_ok=True)

    def _failure(self, cell: Cell) -> Path:
        return self.path / "failed" / f"{cell.hash}.txt"


def is_comparison(path: Path) -> bool:
    """Whether a folder is that of a comparison."""
    return (path / "recipe.toml").is_file()


def default(recipe: Recipe) -> Path:
    """Where a comparison goes that is not told."""
    said = recipe.header
    return Path("compare") / (f"{said.name}-{said.scale}" if said.scale else said.name)


def claim(recipe: Recipe, path: Path) -> Folder:
    """The folder of a comparison, before it is made: a new one, or one of the same recipe and scale, which is continued.

    Raises:
        BadInput: the folder holds something else.
    """
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is no folder")
    if is_comparison(path):
        before, now = read_back(path).header, recipe.header
        if (before.name, before.scale) != (now.name, now.scale):
            raise BadInput(f"{path} holds the comparison {_title(before)}, not {_title(now)}; use another --out")
    elif path.exists() and any(not file.name.startswith(".") for file in path.iterdir()):
        raise BadInput(f"{path} is not empty and holds no comparison; use another --out")
    return Folder(path)


def begin(folder: Folder, recipe: Recipe) -> None:
    """Make the folder and write the recipe into it."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if recipe.csv:
        write_whole(folder.path / "recipe.csv", recipe.csv.encode())
    write_whole(folder.path / "recipe.toml", recipe.to_toml().encode())


def read_back(path: Path) -> Recipe:
    """The recipe of a comparison's folder."""
    return read(str(path / "recipe.toml"), None)


def _title(header: Header) -> str:
    return f"{header.name} ({header.scale})" if header.scale else header.name
