"""What the statistics of a split are over many seeds, so that one published split can be told from what is usual."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from fedlora.config import ClientsConfig, DataConfig
from fedlora.data.dataset import Dataset, Integers
from fedlora.data.domains import deal
from fedlora.data.partition import Spread, statistics

PARTS = ("train", "test")
STATISTICS = tuple(f.name for f in fields(Spread))
TAIL = 40  # one split in so many is left out of the band at each end, so 95 % lie in it


def over_seeds(dataset: Dataset, data: DataConfig, clients: ClientsConfig, seeds: Iterable[int]) -> dict[tuple[str, str], Integers]:
    """(part, statistic) -> its value in the split of each seed, dealt as a run deals it."""
    found = [statistics(deal(dataset, data, clients, seed), dataset) for seed in seeds]
    return {(p, s): np.array([getattr(getattr(each, p), s) for each in found]) for p in PARTS for s in STATISTICS}


@dataclass(frozen=True)
class Band:
    """The values of one statistic over n splits, of which 95 % lie from `low` to `high`, both included; at least one split."""

    values: Integers

    @property
    def low(self) -> int:
        return self._at(len(self.values) // TAIL)

    @property
    def median(self) -> int:
        return self._at((len(self.values) - 1) // 2)

    @property
    def high(self) -> int:
        return self._at(len(self.values) - 1 - len(self.values) // TAIL)

    def __contains__(self, value: int) -> bool:
        return self.low <= value <= self.high

    def as_far(self, value: int) -> int:
        """How many of the splits lie as far out as `value`, on its side."""
        return int(min((self.values <= value).sum(), (self.values >= value).sum()))

    def _at(self, place: int) -> int:
        return int(np.sort(self.values)[place])
