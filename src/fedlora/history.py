"""The server's log of what was merged into the base, and what a client that holds an older base must be sent.

A log is a list of factor pairs, one a version. Once its pairs outweigh the matrices themselves it collapses to one dense sum, added
up in the same order, so that a base has the same bits whichever way it came to its version.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.types import BaseUpdate, Factors, Tensors


@dataclass(frozen=True)
class History:
    """Versions 1 to `start` are in `dense` (empty at start 0); each pair after them makes one version more."""

    start: int = 0
    dense: Tensors = field(default_factory=dict)
    pairs: tuple[Factors, ...] = ()

    @property
    def version(self) -> int:
        return self.start + len(self.pairs)


def append(history: History, pair: Factors) -> History:
    """The history with one more version. It collapses when its pairs hold more numbers than the dense matrices would."""
    pairs = (*history.pairs, pair)
    if sum(map(_numbers, pairs)) <= _dense_numbers(pair):
        return History(history.start, history.dense, pairs)
    return History(history.version + 1, _sum(history.dense, pairs))


def update(history: History, since: int) -> BaseUpdate:
    """What takes a base from version `since` to the newest: the pairs it misses, or the dense whole where that is smaller."""
    missed = history.pairs[max(0, since - history.start) :]
    if since >= history.start and (not missed or sum(map(_numbers, missed)) <= _dense_numbers(missed[0])):
        return BaseUpdate(since, history.version, missed)
    return BaseUpdate(0, history.version, dense=_sum(history.dense, history.pairs))


def _sum(dense: Tensors, pairs: tuple[Factors, ...]) -> dict[str, Tensor]:
    total = dict(dense)
    for pair in pairs:
        for m, B in pair.B.items():
            total[m] = total.get(m, torch.zeros((), dtype=B.dtype)) + pair.scale * (B @ pair.A[m])
    return total


def _numbers(pair: Factors) -> int:
    return sum(pair.A[m].numel() + pair.B[m].numel() for m in pair.A)


def _dense_numbers(pair: Factors) -> int:
    return sum(pair.B[m].shape[0] * pair.A[m].shape[1] for m in pair.A)
