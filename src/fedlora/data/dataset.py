"""What a data set is: texts with labels, in a training, a test and perhaps a validation part."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """n examples: `texts`, and `labels` (n,) that index the data set's `label_names`. `owners` names who each example belongs
    to where the data set has such a column, and is empty otherwise; `domains` (n,) indexes the data set's domains where it has
    several, and is empty otherwise."""

    texts: tuple[str, ...]
    labels: Integers
    owners: tuple[str, ...] = ()
    domains: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Domain:
    """One of the data sets of a run: its classes are `first` to `first + count - 1` of all."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Dataset:
    """A text classification data set. `notes` are lines that a user should read before trusting a result; `domains` is empty
    where there is one; `validation` is there where the round is chosen by it."""

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    domains: tuple[Domain, ...] = ()
    validation: Split | None = None

    @property
    def parts(self) -> Iterator[tuple[str, Split]]:
        """The parts that there are, and what they are called."""
        named = ("training", self.train), ("test", self.test), ("validation", self.validation)
        return ((name, part) for name, part in named if part is not None)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of all that is learned from: texts, labels, owners and domains of every part, and class names."""
        found = blake2b(digest_size=16)

        def add(*values: bytes) -> None:
            """Each behind its length, so that no two lists of values are one stream of bytes."""
            for value in values:
                found.update(len(value).to_bytes(8, "little"))
                found.update(value)

        for name, part in self.parts:
            add(name.encode(), len(part).to_bytes(8, "little"), *map(str.encode, (*part.texts, *part.owners)))
            add(part.labels.astype("<i8").tobytes(), part.domains.astype("<i8").tobytes())
        add(*map(str.encode, self.label_names))
        return found.hexdigest()
