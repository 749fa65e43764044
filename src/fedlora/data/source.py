"""What every place that data comes from hands over: tables as they were found, not yet checked."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A `pyarrow.Table`, and where it comes from, in the words that an error shows: a path, or a Hub id and a split."""

    where: str
    table: Any


@dataclass(frozen=True)
class Source:
    """The tables of a data set. `label_names` is set where the place says what integer labels mean; `test` is None where there
    is no test part."""

    name: str
    train: Part
    test: Part | None = None
    label_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
