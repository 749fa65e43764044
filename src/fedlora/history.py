"""What was merged into the base, version by version, and what a client that holds an older base must be sent.

The server keeps the newest versions as factor pairs, as many as take no more numbers to send than the matrices themselves, and the
sum of all versions. A client that misses only such pairs is sent those, any other the sum: so each is sent the fewer numbers of the
two. The sum is added up in the order of the versions, so that a base has the same bits whichever way it came to its version.

A method that merges keeps a `History` in its state: `missed` is what goes down to a client, `noting` remembers who holds what as
replies pass, `append` adds a version, and `everything` is for the model to deploy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from fedlora import seeds
from fedlora.algebra.tensors import Flat
from fedlora.types import BaseUpdate, Client, Factors, Reply, Tensors


@dataclass(frozen=True)
class History:
    """
    Attributes:
        start: the version that the first pair starts from.
        total: the sum of all versions, module -> (d_out, d_in); empty as long as all of them are kept as pairs, at start 0.
        pairs: what each version from start + 1 on adds.
        seen: client -> the version of the base that it holds; absent is 0.
    """

    start: int = 0
    total: Tensors = field(default_factory=dict)
    pairs: tuple[Factors, ...] = ()
    seen: Mapping[int, int] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.start + len(self.pairs)

    @cached_property
    def whole(self) -> Tensors:
        """The sum of all versions: where pairs must be added up for it, once, however often it is asked for."""
        return self.total if self.start else _sum({}, self.pairs)


def numbers(pair: Factors) -> int:
    """How many numbers a pair holds."""
    return sum(x.numel() for role in (pair.A, pair.B) for x in role.values())


def missed(history: History, client: Client, since: int | None = None) -> BaseUpdate:
    """What takes this client's base to the newest version: the pairs it misses, or the whole sum where they are no longer kept.

    Args:
        since: the version that its base is known to be at; None for the one that the history remembers.
    """
    since = history.seen.get(client.id, 0) if since is None else since
    if since < history.start:
        return BaseUpdate(0, history.version, dense=history.whole)
    return BaseUpdate(since, history.version, history.pairs[since - history.start :])


def everything(history: History) -> BaseUpdate:
    """All versions, from none: as pairs where all are kept and hold no more numbers than the matrices, otherwise the whole sum."""
    if history.start or _fitting(history.pairs, numbers) < len(history.pairs):
        return BaseUpdate(0, history.version, dense=history.whole)
    return BaseUpdate(0, history.version, history.pairs)


def noting(history: History, replies: Iterable[Reply]) -> tuple[History, Iterator[Reply]]:
    """The history where each of these clients holds the newest version, which they were sent, and the same replies, to
    be passed through once: who replied is noted in the new history as they pass."""
    seen = dict(history.seen)

    def passing() -> Iterator[Reply]:
        for reply in replies:
            seen[reply.client.id] = history.version
            yield reply

    return replace(history, seen=seen), passing()


def append(history: History, pair: Factors, cost: Callable[[Factors], int] = numbers) -> History:
    """The history with one more version. The oldest pairs go once the pairs take more numbers to send than the matrices would.

    Args:
        cost: how many numbers of a pair must be sent, where clients know some.
    """
    # Rows contiguous, as a message leaves them: the bits of a product can depend on the layout of its factors.
    pair = replace(pair, A=_contiguous(pair.A), B=_contiguous(pair.B))
    pairs = (*history.pairs, pair)
    gone = len(pairs) - _fitting(pairs, cost)
    if history.start + gone == 0:
        return replace(history, pairs=pairs)
    return replace(history, start=history.start + gone, total=_sum(history.whole, (pair,)), pairs=pairs[gone:])


def append_matrices(history: History, matrices: Mapping[str, Tensor | tuple[Tensor, Tensor]], scale: float = 1.0) -> History:
    """The history with one more version, `scale` times a matrix of every module, given as it is or as factors (B, A).

    It is kept as a pair of at most min(d_out, d_in) ranks: what is wider becomes the matrix beside an identity, without loss. Where
    that pair alone would take more numbers than the matrices, none is made, and the sum takes the matrices up.
    """
    shapes = {m: tuple(M.shape) if isinstance(M, Tensor) else (len(M[0]), M[1].shape[1]) for m, M in matrices.items()}
    widths = {m: min(*shapes[m], shapes[m][1] if isinstance(M, Tensor) else len(M[1])) for m, M in matrices.items()}
    size = sum(widths[m] * (d_out + d_in) for m, (d_out, d_in) in shapes.items())
    if size <= sum(d_out * d_in for d_out, d_in in shapes.values()):
        pairs = {m: _narrow(M, widths[m]) for m, M in matrices.items()}
        return append(history, Factors({m: A for m, (_, A) in pairs.items()}, {m: B for m, (B, _) in pairs.items()}, scale))
    new = {m: M if isinstance(M, Tensor) else M[0] @ M[1] for m, M in matrices.items()}
    old = history.whole
    total = {m: old[m].add(x, alpha=scale) if m in old else scale * x for m, x in new.items()}
    return replace(history, start=history.version + 1, total=total, pairs=())


def restart(pair: Factors, seed: int, *purpose: str | int) -> Factors:
    """The adapter to start from again once a pair is merged: A uniform in +-1/sqrt(d_in), drawn for this purpose, and B zero."""

    def draw(m: str, A: Tensor) -> Tensor:
        rank, d_in = A.shape
        numbers = seeds.generator(seed, "restart", *purpose, m).uniform(-(d_in**-0.5), d_in**-0.5, (rank, d_in))
        return torch.from_numpy(numbers).to(A)

    return replace(pair, A={m: draw(m, A) for m, A in pair.A.items()}, B={m: torch.zeros_like(B) for m, B in pair.B.items()})


def _contiguous(tensors: Tensors) -> Tensors:
    return tensors if isinstance(tensors, Flat) else {m: t.contiguous() for m, t in tensors.items()}


def _narrow(M: Tensor | tuple[Tensor, Tensor], width: int) -> tuple[Tensor, Tensor]:
    if not isinstance(M, Tensor) and len(M[1]) == width:
        return M
    W = M if isinstance(M, Tensor) else M[0] @ M[1]
    unit = torch.eye(width, dtype=W.dtype, device=W.device)
    return (W, unit) if W.shape[0] >= W.shape[1] else (unit, W)


def _sum(total: Tensors, pairs: tuple[Factors, ...]) -> Tensors:
    """A sum with pairs added to it in turn. No tensor of it is changed: clients may hold them."""
    out = dict(total)
    for pair in pairs:
        for m, B in pair.B.items():
            product = (B @ pair.A[m]).mul_(pair.scale)
            out[m] = product.add_(out[m]) if m in out else product
    return out


def _fitting(pairs: tuple[Factors, ...], cost: Callable[[Factors], int]) -> int:
    """How many of the newest pairs take no more numbers to send, together, than dense matrices."""
    if not pairs:
        return 0
    room = sum(B.shape[0] * pairs[0].A[m].shape[1] for m, B in pairs[0].B.items())
    return sum(size <= room for size in accumulate(map(cost, reversed(pairs))))
