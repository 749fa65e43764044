"""RAVAN (Raje et al., NeurIPS 2025, arXiv 2506.05568): several heads with frozen outer factors, each with a small trained core.

    dW = s sum_{i <= h} s_i B_i H_i A_i,   B_i (d_out, r) and A_i (r, d_in) random orthonormal and frozen, H_i = 0, s_i = 1
    client k:  trains H_i and s_i, those of its h_k best heads where its budget is smaller
    server:    H_i <- H_i + sum_k w_k (s_{k,i} H_{k,i} - H_i),   s_i <- 1,   w_k = n_k / sum of n over the participants

Exact: the outer factors are common to all. A client that did not train head i counts with the H_i that it was sent: its change
is zero. What crosses the wire: up, s_i H_i of the trained heads, as changes, h_k r^2 a module, and a bit for each of the h heads,
once for all modules, that says which they are: what the server goes by, and what a client's memory of a compressed head goes by;
down, H_i of all heads, h r^2. The outer factors come from the seed, and the s_i go up inside their heads.

r is the largest rank of the run, h_k = floor(h r_k / r), at least 1; the best heads are those of the largest ||H_i||_F over the
whole model, of equal ones the first. Heads are orthogonal to one another as long as a module has directions left.

Ours: the LoRA scale s = alpha / r; that heads are chosen for the whole model, not by module.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlora import seeds
from fedlora.algebra.tensors import each, plus
from fedlora.errors import BadInput
from fedlora.types import Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, index

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Outer:
    """What gives the frozen factors of all heads."""

    seed: int
    shapes: Shapes
    scale: float


@dataclass(frozen=True)
class State:
    outer: Outer
    H: Tensors  # (h, r, r)


@dataclass(frozen=True)
class Up:
    C: Tensors = change("trained", "core", "core")  # s_i H_i - H_i as sent, of the trained heads in order
    trained: Tensors = index("trained", "heads")  # one tensor for all modules, so it travels once


def frame(numbers: np.random.Generator, d: int, rank: int, count: int) -> np.ndarray:
    """(count, d, rank): orthonormal columns, and orthogonal to the other frames as long as these fit into d."""
    together = max(1, d // rank)
    out = np.zeros((count, d, rank))
    for first in range(0, count, together):
        block = out[first : first + together]
        width = min(d, len(block) * rank)  # a rank above d leaves columns of zeros
        Q = np.zeros((d, len(block) * rank))
        Q[:, :width] = np.linalg.qr(numbers.normal(size=(d, width)))[0]
        block[:] = Q.reshape(d, len(block), rank).transpose(1, 0, 2)
    return out


def outer_factors(outer: Outer, H: Tensors) -> tuple[Factors, ...]:
    """Every head's B_i and A_i, in the dtype of its core and without it."""
    like = next(iter(H.values()))
    return _outer(outer.seed, tuple((m, *shape) for m, shape in outer.shapes.items()), outer.scale, *like.shape[:2], like.dtype)


@lru_cache(maxsize=1)  # all clients of a process have the same, and drawing them for a whole model takes seconds
def _outer(
    seed: int, shapes: tuple[tuple[str, int, int], ...], scale: float, heads: int, rank: int, dtype: torch.dtype
) -> tuple[Factors, ...]:
    def drawn(side: str, m: str, d: int) -> Tensor:
        return torch.from_numpy(frame(seeds.generator(seed, "ravan", side, m), d, rank, heads)).to(dtype)

    B = {m: drawn("B", m, d_out) for m, d_out, _ in shapes}
    A = {m: drawn("A", m, d_in).mT for m, _, d_in in shapes}
    return tuple(
        Factors({m: x[i].contiguous() for m, x in A.items()}, {m: x[i] for m, x in B.items()}, scale) for i in range(heads)
    )


def slots(outer: Outer, H: Tensors) -> dict[str, Factors]:
    """ "head0", "head1", ...: each with its core and s_i = 1."""
    ones = {m: torch.ones(1, dtype=x.dtype, device=x.device) for m, x in H.items()}
    return {f"head{i}": replace(f, C={m: x[i] for m, x in H.items()}, D=ones) for i, f in enumerate(outer_factors(outer, H))}


def head_count(heads: int, rank: int, largest: int) -> int:
    """How many of the heads a client of this rank trains."""
    return max(1, heads * rank // largest)


def best_heads(H: Tensors, rank: int) -> list[int]:
    """The heads that a client of this rank trains: those with the largest cores over the whole model, in order."""
    heads, largest, _ = next(iter(H.values())).shape
    norms = torch.stack([x.double().square().sum(dim=(1, 2)) for x in H.values()]).sum(dim=0)
    return sorted(norms.sort(descending=True, stable=True).indices[: head_count(heads, rank, largest)].tolist())


@dataclass(frozen=True)
class Ravan:
    """heads: h, how many pairs of outer factors a module has."""

    heads: int = 4

    FACTS: ClassVar = Facts(
        title="RAVAN",
        paper="2506.05568",
        year=2025,
        exact=True,
        mixed_ranks=True,
        personal=False,
        upload="h_k r^2",
        download="h r^2",
        server="O(sum_k h_k r^2)",
        asks=frozenset({"C", "D", "slots"}),
        linear=lambda method, setup, round: True,
        dims=lambda method, setup, client: {
            "trained": head_count(method.heads, client.rank, setup.all_ranks[-1]),
            "heads": method.heads,
            "core": setup.all_ranks[-1],
        },
    )

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise BadInput("heads must be at least 1")

    def init(self, setup: Setup) -> State:
        rank = setup.all_ranks[-1]
        outer = Outer(setup.seed, dict(setup.shapes), setup.scaling(rank))
        H = {m: A.new_zeros(self.heads, rank, rank) for m, A in setup.fresh(rank).A.items()}
        return State(outer, H)

    def hold(self, setup: Setup, client: Client) -> Outer:
        return Outer(setup.seed, dict(setup.shapes), setup.scaling(setup.all_ranks[-1]))

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Tensors:
        return state.H

    def local(self, down: Tensors, held: Outer, client: Client, round: int) -> Local:
        mine = best_heads(down, client.rank)
        roles = frozenset((f"head{i}", role) for i in mine for role in "CD")
        done = (yield Train(slots(held, down), roles)).slots
        folded = {m: torch.stack([done[f"head{i}"].D[m] * done[f"head{i}"].C[m] for i in mine]) for m in down}
        trained = torch.zeros(len(next(iter(down.values()))), dtype=torch.bool)
        trained[mine] = True
        return Up(each(lambda new, before: new - before[mine], folded, down), dict.fromkeys(down, trained)), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        total, examples = {m: torch.zeros_like(x, dtype=torch.float64) for m, x in state.H.items()}, 0
        for reply in replies:
            n = reply.client.num_examples
            for m, trained in reply.up.trained.items():
                total[m][trained] += n * reply.up.C[m].double()
            examples += n
        mean = each(lambda sum_, before: (sum_ / examples).to(before.dtype), total, state.H)
        return replace(state, H=plus(state.H, mean)), {}

    def deploy(self, state: State) -> Model:
        return Model(slots(state.outer, state.H))
