"""What every place that data comes from hands over: tables as they were found, not yet checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A `pyarrow.Table`, and where it comes from, in the words that an error shows: a path, or a Hub id and a split.

    `numbers` says for each row which `unit` it is, of the file (line 7) or of the folder (file cat/1.png); without them rows are
    counted from 1. `hint` is what may help where a column is missing.
    """

    where: str
    table: Any
    numbers: Sequence[int] | Sequence[str] | None = None
    unit: str = "row"
    hint: str = ""
    notes: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Where a row of the table, from 0, is in the file."""
        return f"{self.unit} {self.numbers[row]}" if self.numbers is not None else f"row {row + 1}"


@dataclass(frozen=True)
class Source:
    """The tables of a data set. `label_names` is set where the place says what integer labels mean, `owners` where it says in which
    order the owners of rows are; `test` and `validation` are None where there is no such part."""

    name: str
    train: Part
    test: Part | None = None
    label_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    validation: Part | None = None
    owners: tuple[str, ...] = ()
