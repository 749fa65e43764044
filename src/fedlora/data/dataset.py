"""What a data set is: texts with labels, in a training and a test part."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """n examples: `texts`, and `labels` (n,) that index the data set's `label_names`. `owners` names who each example belongs
    to where the data set has such a column, and is empty otherwise; `tasks` (n,) indexes the data set's tasks where it has
    several, and is empty otherwise."""

    texts: tuple[str, ...]
    labels: Integers
    owners: tuple[str, ...] = ()
    tasks: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """One of the data sets of a run: its classes are `first` to `first + count - 1` of all."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Dataset:
    """A text classification data set. `notes` are lines that a user should read before trusting a result; `tasks` is empty
    where there is one."""

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
