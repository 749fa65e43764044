"""Dealing a data set's examples to clients.

Notation: K clients, C strata (classes, as a rule: `data.strata` says), n examples. Every function here is pure: the same data,
configuration and seed give the same parts, and each example belongs to exactly one client (with one exception, which `by_column`
states).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.config import DataConfig, Partition
from fedlora.data.dataset import Dataset, Integers, Split
from fedlora.errors import BadInput
from fedlora.seeds import generator

DEFAULT_COUNT = 10


@dataclass(frozen=True)
class Parts:
    """Who has what: for each of K clients the rows of the training, test and validation part, in order, and the client's name.
    `rule` says how they were dealt, in the words of a title, e.g. "Dirichlet(0.5)"; `validation` is empty where there is none. The
    last `held_out` of the clients never train."""

    train: tuple[Integers, ...]
    test: tuple[Integers, ...]
    names: tuple[str, ...]
    rule: str = ""
    validation: tuple[Integers, ...] = ()
    held_out: int = 0


@dataclass(frozen=True)
class Spread:
    """The largest and smallest number of examples |D_k|, and of different strata |C_k| (classes, as a rule), that a
    client has."""

    max_examples: int
    min_examples: int
    max_classes: int
    min_classes: int


@dataclass(frozen=True)
class Statistics:
    """How unequal the clients are: what the LoRA-A² paper (2410.22815) gives in its Tables 4 and 5."""

    train: Spread
    test: Spread
    validation: Spread | None = None


def set_aside(parts: Parts, held_out: int | float | None, seed: int) -> Parts:
    """The same parts with so many clients (or such a share of them, at least one), drawn by seed, last and held out.

    Raises:
        BadInput: no client would be left to train.
    """
    if held_out is None:
        return parts
    clients = len(parts.names)
    count = held_out if isinstance(held_out, int) else max(1, round(held_out * clients))
    if count >= clients:
        raise BadInput(f"clients.held_out = {held_out}: the run has {clients} clients, and one at least must train")
    drawn = sorted(int(k) for k in generator(seed, "held out").permutation(clients)[:count])
    order = [*(k for k in range(clients) if k not in drawn), *drawn]

    def ordered(each: tuple[Integers, ...]) -> tuple[Integers, ...]:
        return tuple(each[k] for k in order) if each else each

    names = tuple(parts.names[k] for k in order)
    return Parts(ordered(parts.train), ordered(parts.test), names, parts.rule, ordered(parts.validation), count)


def split(dataset: Dataset, config: DataConfig, count: int | None, seed: int) -> Parts:
    """The parts of `count` clients (10 when None; with a column of owners, as many as there are owners), by `config.partition`.

    Raises:
        BadInput: more clients than the data has room for, given `config.min_size`, or than the rule can serve.
    """
    if config.partition is Partition.COLUMN:
        parts = by_column(dataset, count, config.column or "")
    elif config.partition is Partition.STRATA:
        parts = by_stratum(dataset, count)
    else:
        clients = DEFAULT_COUNT if count is None else count
        if clients * config.min_size > len(dataset.train):
            raise BadInput(
                f"clients.count = {clients}: {clients} clients with data.min_size = {config.min_size} need "
                f"{clients * config.min_size:,} training examples, but there are {len(dataset.train):,}"
            )
        match config.partition:
            case Partition.IID:
                parts = iid(dataset, clients, seed)
            case Partition.DIRICHLET:
                parts = dirichlet(dataset, clients, config.alpha, config.min_size, seed)
            case Partition.PATHOLOGICAL:
                parts = pathological(dataset, clients, seed)
    smallest = min(range(len(parts.names)), key=lambda k: len(parts.train[k]))
    if len(parts.train[smallest]) < config.min_size:
        raise BadInput(
            f"data.min_size = {config.min_size}: with data.partition = {config.partition.value}, {parts.names[smallest]} has "
            f"{len(parts.train[smallest])} training examples"
        )
    return parts


def iid(dataset: Dataset, count: int, seed: int) -> Parts:
    """Shuffle and deal evenly: sizes differ by at most one."""

    def deal(part: str, examples: Split) -> tuple[Integers, ...]:
        order = generator(seed, "partition", "iid", part).permutation(len(examples))
        return tuple(np.sort(rows) for rows in np.array_split(order, count))

    return _dealt(dataset, deal, _numbered(count), "IID")


def dirichlet(dataset: Dataset, count: int, alpha: float, min_size: int, seed: int) -> Parts:
    """Label skew (1909.06335): each stratum is shared out by one draw p ~ Dirichlet(alpha) over the clients, for every part.

    A client's count is rounded to the nearest example. A client below `min_size` examples then takes random ones from the
    largest client; so does one of the other parts, as far as they have enough for everybody.
    """
    shares = [dirichlet_shares(generator(seed, "partition", "shares", c), alpha, count) for c in range(len(dataset.strata_names))]

    def deal(part: str, examples: Split) -> tuple[Integers, ...]:
        pieces: list[list[Integers]] = [[] for _ in range(count)]
        for c, p in enumerate(shares):
            rows = _shuffled_stratum(examples, c, seed, part)
            # Rounding the running total, not each count, so that the counts add up.
            cuts = np.rint(np.cumsum(p[:-1]) * len(rows)).astype(np.int64)
            for piece, share in zip(pieces, np.split(rows, cuts), strict=True):
                piece.append(share)
        dealt = [np.concatenate(piece) for piece in pieces]
        return _fill(dealt, min(min_size, len(examples) // count), generator(seed, "partition", "fill", part))

    return _dealt(dataset, deal, _numbered(count), f"Dirichlet({alpha:g})")


def dirichlet_shares(rng: np.random.Generator, alpha: float, count: int) -> NDArray[np.float64]:
    """A draw (count,) from the symmetric Dirichlet(alpha), for every alpha > 0.

    It is Gamma(alpha) variates over their sum, but below alpha = 0.01 most of those underflow. So their logarithms are drawn:
    Gamma(alpha) is Gamma(alpha + 1) U^(1/alpha), and -log U is a standard exponential.
    """
    logs = np.log(rng.standard_gamma(alpha + 1, count)) - rng.standard_exponential(count) / alpha
    weights = np.exp(logs - logs.max())
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def pathological(dataset: Dataset, count: int, seed: int) -> Parts:
    """Pairs of clients share pairs of strata: clients 2j and 2j+1 get half each of the strata c with (c // 2) mod pairs = j.

    With as many clients as classes, every client has two classes: the LoRA-A² paper's pathological setting.

    Raises:
        BadInput: an odd number of clients, or more pairs of clients than of strata.
    """
    strata = len(dataset.strata_names)
    most = 2 * ((strata + 1) // 2)
    if count % 2 or count > most:
        raise BadInput(
            f"clients.count = {count}: a pathological split of {strata} {dataset.strata_kind} needs an even number, at most {most}"
        )

    def deal(part: str, examples: Split) -> tuple[Integers, ...]:
        pieces: list[list[Integers]] = [[] for _ in range(count)]
        for c in range(strata):
            rows = _shuffled_stratum(examples, c, seed, part)
            first = 2 * ((c // 2) % (count // 2))
            middle = (len(rows) + c % 2) // 2  # of an odd number, the client who gets one more alternates
            pieces[first].append(rows[:middle])
            pieces[first + 1].append(rows[middle:])
        return tuple(np.sort(np.concatenate(piece)) for piece in pieces)

    return _dealt(dataset, deal, _numbered(count), "pathological")


def by_column(dataset: Dataset, count: int | None, column: str) -> Parts:
    """One client for each owner of a training example, by name; or for each owner in the data set's own order.

    Test and validation examples of other owners belong to nobody. Such a part without owners belongs to every client as a whole.

    Raises:
        BadInput: `count` is given and is not the number of owners.
    """
    names = dataset.owners or tuple(sorted(set(dataset.train.owners)))
    if count is not None and count != len(names):
        raise BadInput(f"clients.count = {count}: column '{column}' has {len(names)} owners")

    def deal(part: str, examples: Split) -> tuple[Integers, ...]:
        if part == "train" or examples.owners:
            return _rows_of(names, examples.owners)
        return (np.arange(len(examples), dtype=np.int64),) * len(names)

    return _dealt(dataset, deal, names, f"by column '{column}'")


def by_stratum(dataset: Dataset, count: int | None) -> Parts:
    """One client for each stratum of the training part, by its name; with fewer clients, stratum c (of those) belongs to client c
    modulo K. Examples of other strata belong to nobody.

    Raises:
        BadInput: more clients than strata.
    """
    known = np.unique(dataset.train.strata)
    clients = len(known) if count is None else count
    if clients > len(known):
        raise BadInput(f"clients.count = {clients}: the training part has {len(known)} {dataset.strata_kind}, one a client at most")

    def deal(part: str, examples: Split) -> tuple[Integers, ...]:
        return tuple(np.flatnonzero(np.isin(examples.strata, known[k::clients])) for k in range(clients))

    names = tuple(dataset.strata_names[c] for c in known) if clients == len(known) else _numbered(clients)
    return _dealt(dataset, deal, names, f"by {dataset.strata_kind}")


def statistics(parts: Parts, dataset: Dataset) -> Statistics:
    """The extremes over clients of examples and classes, in each part."""
    validation = _spread(parts.validation, dataset.validation) if dataset.validation is not None else None
    return Statistics(_spread(parts.train, dataset.train), _spread(parts.test, dataset.test), validation)


def counts(rows: Sequence[Integers], strata: Integers, count: int) -> Integers:
    """How many examples of each of `count` strata each client has: (K, C)."""
    return np.stack([np.bincount(strata[mine], minlength=count) for mine in rows]).astype(np.int64)


def _dealt(dataset: Dataset, deal: Callable[[str, Split], tuple[Integers, ...]], names: tuple[str, ...], rule: str) -> Parts:
    """Each part dealt by one rule."""
    validation = deal("validation", dataset.validation) if dataset.validation is not None else ()
    return Parts(deal("train", dataset.train), deal("test", dataset.test), names, rule, validation)


def _spread(rows: Sequence[Integers], examples: Split) -> Spread:
    sizes = [len(mine) for mine in rows]
    strata = [len(np.unique(examples.strata[mine])) for mine in rows]
    return Spread(max(sizes), min(sizes), max(strata), min(strata))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"client {k}" for k in range(count))


def _shuffled_stratum(examples: Split, c: int, seed: int, part: str) -> Integers:
    return generator(seed, "partition", "shuffle", part, c).permutation(np.flatnonzero(examples.strata == c))


def _rows_of(names: Sequence[str], owners: Sequence[str]) -> tuple[Integers, ...]:
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, owner in enumerate(owners):
        if owner in rows:
            rows[owner].append(row)
    return tuple(np.array(mine, dtype=np.int64) for mine in rows.values())


def _fill(dealt: Sequence[Integers], least: int, rng: np.random.Generator) -> tuple[Integers, ...]:
    """The same examples with at least `least` for each client, which K * least <= n allows. The largest client gives, the first
    of equals, one example at a time: so it is never left below `least` itself."""
    rows = [mine.tolist() for mine in dealt]
    sizes = np.array([len(mine) for mine in rows])
    for poor in np.flatnonzero(sizes < least):
        while sizes[poor] < least:
            rich = int(sizes.argmax())
            rows[poor].append(rows[rich].pop(int(rng.integers(sizes[rich]))))
            sizes[poor] += 1
            sizes[rich] -= 1
    return tuple(np.sort(np.array(mine, dtype=np.int64)) for mine in rows)
