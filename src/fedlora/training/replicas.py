"""Clients of a step side by side, each group in a thread of its own with fewer of the processor's cores.

A small product is little faster on two cores than on one, so two groups of clients, a core each, are done before one of all of
them on both. The threads share the model's parameters; all else that a forward pass changes of a model is each one's own.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch

Replica = TypeVar("Replica")
Work = TypeVar("Work")
Found = TypeVar("Found")

EVEN = 1.15  # how much more than its share the largest group may have, else more is lost by waiting than is gained


def spread(sizes: Sequence[int], threads: int) -> list[list[int]]:
    """Positions of things of these sizes in groups that are about even, each with as many of the threads: as many groups as
    possible, which may be one."""
    largest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    for count in (n for n in range(min(threads, len(sizes)), 1, -1) if threads % n == 0):
        groups: list[list[int]] = [[] for _ in range(count)]
        taken = [0] * count
        for i in largest_first:
            least = taken.index(min(taken))
            groups[least].append(i)
            taken[least] += sizes[i]
        if max(taken) * count <= EVEN * sum(sizes):
            return [sorted(group) for group in groups]
    return [list(range(len(sizes)))]


class Replicas(Generic[Replica]):
    """Replicas of a model, each used by one thread at a time: the first one, and others that `another` makes when they are needed;
    None where there can be none."""

    def __init__(self, first: Replica, another: Callable[[], Replica | None]) -> None:
        self._replicas, self._another, self._alone = [first], another, False
        self._pool: ThreadPoolExecutor | None = None

    def spread(self, sizes: Sequence[int]) -> list[list[int]]:
        """As `spread` does it, for as many threads as this one has, and one group where there is no other replica."""
        groups = spread(sizes, 1 if self._alone else torch.get_num_threads())
        while len(self._replicas) < len(groups):
            replica = self._another()
            if replica is None:
                self._alone = True
                return spread(sizes, 1)
            self._replicas.append(replica)
        return groups

    def run(self, work: Callable[[Replica, Work], Found], parts: Sequence[Work]) -> list[Found]:
        """What `work` makes of the part of each group, all at the same time, this one's threads being shared out among them."""
        if len(parts) == 1:
            return [work(self._replicas[0], parts[0])]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="replica")
        threads = torch.get_num_threads()

        def one(replica: Replica, part: Work) -> Found:
            torch.set_num_threads(threads // len(parts))  # of this thread alone
            return work(replica, part)

        futures = [self._pool.submit(one, replica, part) for replica, part in zip(self._replicas[: len(parts)], parts, strict=True)]
        try:
            return [future.result() for future in futures]
        finally:
            wait(futures)  # also when one has failed, or when this thread is interrupted
            torch.set_num_threads(threads)  # what threads that others begin have
