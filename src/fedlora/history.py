"""The server's log of what was merged into the base, and what a client that holds an older base must be sent.

A log is a list of factor pairs, one a version. Once its pairs outweigh the matrices themselves it collapses to one dense sum, added
up in the same order, so that a base has the same bits whichever way it came to its version.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedlora import seeds
from fedlora.algebra.tensors import Flat
from fedlora.types import BaseUpdate, Factors, Reply, Tensors


@dataclass(frozen=True)
class History:
    """Versions 1 to `start` are in `dense` (empty at start 0); each pair after them makes one version more."""

    start: int = 0
    dense: Tensors = field(default_factory=dict)
    pairs: tuple[Factors, ...] = ()

    @property
    def version(self) -> int:
        return self.start + len(self.pairs)

    @cached_property
    def whole(self) -> Tensors:
        """The sum of all versions: added up once, however many clients are sent it."""
        return _sum(self.dense, self.pairs)


def numbers(pair: Factors) -> int:
    """How many numbers a pair holds."""
    return sum(x.numel() for role in (pair.A, pair.B) for x in role.values())


def append(history: History, pair: Factors, cost: Callable[[Factors], int] = numbers) -> History:
    """The history with one more version. It collapses when its pairs take more numbers to send than the dense matrices would.

    Args:
        cost: how many numbers of a pair must be sent, where clients know some.
    """
    # Rows contiguous, as a message leaves them: the bits of a product can depend on the layout of its factors.
    pair = replace(pair, A=_contiguous(pair.A), B=_contiguous(pair.B))
    pairs = (*history.pairs, pair)
    if _smaller(pairs, cost):
        return History(history.start, history.dense, pairs)
    return History(history.version + 1, _sum(history.dense, pairs))


def append_matrices(history: History, matrices: Mapping[str, Tensor | tuple[Tensor, Tensor]], scale: float = 1.0) -> History:
    """The history with one more version, `scale` times a matrix of every module, given as it is or as factors (B, A).

    It is logged as a pair of at most min(d_out, d_in) ranks: what is wider becomes the matrix beside an identity, without loss.
    Where the log collapses anyway no such pair is made.
    """
    shapes = {m: tuple(M.shape) if isinstance(M, Tensor) else (len(M[0]), M[1].shape[1]) for m, M in matrices.items()}
    widths = {m: min(*shapes[m], shapes[m][1] if isinstance(M, Tensor) else len(M[1])) for m, M in matrices.items()}
    size = sum(widths[m] * (d_out + d_in) for m, (d_out, d_in) in shapes.items())
    if sum(map(numbers, history.pairs)) + size <= sum(d_out * d_in for d_out, d_in in shapes.values()):
        pairs = {m: _narrow(M, widths[m]) for m, M in matrices.items()}
        return append(history, Factors({m: A for m, (_, A) in pairs.items()}, {m: B for m, (B, _) in pairs.items()}, scale))
    total = history.whole
    new = {m: M if isinstance(M, Tensor) else M[0] @ M[1] for m, M in matrices.items()}
    return History(history.version + 1, {m: total[m].add(x, alpha=scale) if m in total else scale * x for m, x in new.items()})


def restart(pair: Factors, seed: int, *purpose: str | int) -> Factors:
    """The adapter to start from again once a pair is merged: A uniform in +-1/sqrt(d_in), drawn for this purpose, and B zero."""

    def draw(m: str, A: Tensor) -> Tensor:
        rank, d_in = A.shape
        numbers = seeds.generator(seed, "restart", *purpose, m).uniform(-(d_in**-0.5), d_in**-0.5, (rank, d_in))
        return torch.from_numpy(numbers).to(A)

    return replace(pair, A={m: draw(m, A) for m, A in pair.A.items()}, B={m: torch.zeros_like(B) for m, B in pair.B.items()})


def update(history: History, since: int, cost: Callable[[Factors], int] = numbers) -> BaseUpdate:
    """What takes a base from version `since` to the newest: the pairs it misses, or the dense whole where that is smaller."""
    missed = history.pairs[max(0, since - history.start) :]
    if since >= history.start and _smaller(missed, cost):
        return BaseUpdate(since, history.version, missed)
    return BaseUpdate(0, history.version, dense=history.whole)


def noting(replies: Iterable[Reply], seen: dict[int, int], version: int) -> Iterator[Reply]:
    """The same replies; as they pass, it is noted in `seen` that their clients hold this version."""
    for reply in replies:
        seen[reply.client.id] = version
        yield reply


def _contiguous(tensors: Tensors) -> Tensors:
    return tensors if isinstance(tensors, Flat) else {m: t.contiguous() for m, t in tensors.items()}


def _narrow(M: Tensor | tuple[Tensor, Tensor], width: int) -> tuple[Tensor, Tensor]:
    if not isinstance(M, Tensor) and len(M[1]) == width:
        return M
    W = M if isinstance(M, Tensor) else M[0] @ M[1]
    unit = torch.eye(width, dtype=W.dtype, device=W.device)
    return (W, unit) if W.shape[0] >= W.shape[1] else (unit, W)


def _sum(dense: Tensors, pairs: tuple[Factors, ...]) -> dict[str, Tensor]:
    total = {m: x.clone() for m, x in dense.items()} if pairs else dict(dense)
    for pair in pairs:
        for m, B in pair.B.items():
            product = (B @ pair.A[m]).mul_(pair.scale)
            total[m] = total[m].add_(product) if m in total else product
    return total


def _smaller(pairs: tuple[Factors, ...], cost: Callable[[Factors], int]) -> bool:
    """Whether pairs take no more numbers to send than dense matrices."""
    if not pairs:
        return True
    return sum(map(cost, pairs)) <= sum(pairs[0].B[m].shape[0] * A.shape[1] for m, A in pairs[0].A.items())
