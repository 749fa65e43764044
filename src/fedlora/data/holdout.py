"""Which examples are held out of a part, so that every owner and every stratum is in both as far as there is enough of it.

Notation: n examples, share s. First each owner, and each stratum that is then still without, keeps one example, drawn at random. Of
the others round(s n) are held out: how many of each owner, and of an owner's how many of each stratum, are its shares of that
number, rounded so that they add up (largest remainders; of equals by lot). Which ones they are is drawn at random.
"""

import numpy as np
from numpy.typing import NDArray

from fedlora.data.dataset import Integers, Split


def hold_out(split: Split, share: float, rng: np.random.Generator) -> tuple[Integers, Integers]:
    """The rows that are kept and those that are held out, both in order: round(share n) of them but one at least, and not more
    than leaves each owner and each stratum one. None is held out where that leaves none."""
    owners = np.unique(split.owners, return_inverse=True)[1] if split.owners else np.zeros(len(split), dtype=np.int64)
    kept = _one_each(owners, split.strata, rng)
    total = min(max(1, round(share * len(split))), int((~kept).sum()))
    free = np.bincount(owners[~kept], minlength=owners.max() + 1)
    numbers = apportion(share * np.bincount(owners), free, total, rng)
    order = np.argsort(owners, kind="stable")
    held = []
    for mine, number in zip(np.split(order, np.cumsum(np.bincount(owners))[:-1]), numbers, strict=True):
        if number:
            strata, of, counts = np.unique(split.strata[mine], return_inverse=True, return_counts=True)
            rest = np.bincount(of[~kept[mine]], minlength=len(strata))
            each = apportion(number * counts / len(mine), rest, int(number), rng)
            held += [rng.permutation(mine[(of == c) & ~kept[mine]])[: each[c]] for c in np.flatnonzero(each)]
    out = np.sort(np.concatenate(held)) if held else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(split)), out), out


def apportion(wanted: NDArray[np.floating], most: Integers, total: int, rng: np.random.Generator) -> Integers:
    """Whole numbers that add up to `total`, none above `most`, near `wanted` (m,): rounded down, then one more for the largest
    remainders, of equals by lot, again until all is given. `total` is at most the sum of `most`, and at least that of `wanted`
    rounded down."""
    counts: Integers = np.minimum(np.floor(wanted).astype(np.int64), most)
    lot = rng.permutation(len(counts))
    while counts.sum() < total:
        order = np.lexsort((lot, counts - wanted))
        counts[order[(counts < most)[order]][: total - counts.sum()]] += 1
    return counts


def _one_each(owners: Integers, strata: Integers, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A mask (n,) of one example of each owner, and of each stratum that those leave out."""
    order = rng.permutation(len(strata))
    kept = np.zeros(len(strata), dtype=bool)
    kept[order[np.unique(owners[order], return_index=True)[1]]] = True
    first = order[np.unique(strata[order], return_index=True)[1]]
    kept[first[~np.isin(strata[first], strata[kept])]] = True
    return kept
