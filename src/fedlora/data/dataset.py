"""What a data set is: texts with labels, in a training and a test part."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """n examples: `texts`, and `labels` (n,) that index the data set's `label_names`. `owners` names who each example belongs
    to where the data set has such a column, and is empty otherwise."""

    texts: tuple[str, ...]
    labels: Integers
    owners: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Dataset:
    """A text classification data set. `notes` are lines that a user should read before trusting a result."""

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
