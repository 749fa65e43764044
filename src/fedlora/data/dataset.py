"""What a data set is: examples with targets, in a training, a test and perhaps a validation part."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def _none() -> Integers:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """n examples.

    Attributes:
        inputs: what is given of each: a text, or the bytes of an image file.
        targets: what is to be said of each, (n,): the index of its class, or a number.
        owners: who each belongs to, where the data set has such a column; empty otherwise.
        domains: (n,) indexes the data set's domains where it has several; empty otherwise.
        strata: (n,) indexes the data set's `strata_names`: what clients are dealt unequal shares of. The targets where nothing else
            is given.
    """

    inputs: tuple[Any, ...]
    targets: NDArray[Any]
    owners: tuple[str, ...] = ()
    domains: Integers = field(default_factory=_none)
    strata: Integers = field(default_factory=_none)

    def __post_init__(self) -> None:
        if len(self.strata) != len(self.targets):
            object.__setattr__(self, "strata", self.targets)

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Integers) -> "Split":
        """The examples in these rows."""
        owners = tuple(self.owners[row] for row in rows) if self.owners else ()
        domains = self.domains[rows] if len(self.domains) else self.domains
        return Split(tuple(self.inputs[row] for row in rows), self.targets[rows], owners, domains, self.strata[rows])


@dataclass(frozen=True)
class Domain:
    """One of the data sets of a run: of a list of names over all of them, its own are `first` to `first + count - 1`."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Schema:
    """What targets and inputs are: everybody must agree on it before training.

    Attributes:
        label_names: of the classes; empty where targets are numbers.
        domains: each with its classes, in a run of several data sets.
        shape: of an input as the model takes it, where all have one (channels, height, width of an image); empty otherwise.
        scales: mean and spread of targets that are numbers, for each domain, or for the one data set; empty where they are classes.
        prompts: how a language model is asked, for each domain, or for the one data set: the name of the data's shape, and its
            column of prompts; empty for what is no language model.
    """

    label_names: tuple[str, ...] = ()
    domains: tuple[Domain, ...] = ()
    shape: tuple[int, ...] = ()
    scales: tuple[tuple[float, float], ...] = ()
    prompts: tuple[tuple[str, str], ...] = ()

    def classes(self, domain: int | None) -> slice:
        """Those of a domain; of all where it is None."""
        if domain is None:
            return slice(0, len(self.label_names))
        own = self.domains[domain]
        return slice(own.first, own.first + own.count)


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
        notes: lines that a user should read before trusting a result.
        domains: each with its strata; empty where there is one.
        validation: there where the round is chosen by it.
        strata_names: what `Split.strata` index; the classes where nothing else is given.
        strata_kind: what strata are called, in the plural.
        things: what its examples are called, in the plural.
        owners: those of its examples in an order of their own; empty where it is that of their names.
    """

    name: str
    train: Split
    test: Split
    schema: Schema
    notes: tuple[str, ...] = ()
    domains: tuple[Domain, ...] = ()
    validation: Split | None = None
    strata_names: tuple[str, ...] = ()
    strata_kind: str = "classes"
    things: str = "texts"
    owners: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.strata_names:
            object.__setattr__(self, "strata_names", self.schema.label_names)

    @property
    def parts(self) -> Iterator[tuple[str, Split]]:
        """The parts that there are, and what they are called."""
        named = ("training", self.train), ("test", self.test), ("validation", self.validation)
        return ((name, part) for name, part in named if part is not None)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of all that is learned from: inputs, targets, owners and domains of every part, and class names."""
        found = blake2b(digest_size=16)

        def add(*values: bytes) -> None:
            """Each behind its length, so that no two lists of values are one stream of bytes."""
            for value in values:
                found.update(len(value).to_bytes(8, "little"))
                found.update(value)

        for name, part in self.parts:
            inputs = (x.encode() if isinstance(x, str) else x for x in part.inputs)
            add(name.encode(), len(part).to_bytes(8, "little"), *inputs, *map(str.encode, part.owners))
            targets = part.targets.astype("<i8" if part.targets.dtype.kind in "iu" else "<f8")
            add(targets.tobytes(), part.domains.astype("<i8").tobytes())
        add(*map(str.encode, self.schema.label_names))
        return found.hexdigest()
