"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): every client its own rank, zero-padded averages, self-pruning.

    client k:  loss + lambda sum_m ||B[:, q:]||_F ||A[q:, :]||_F,   q = floor(gamma r_k): pushes the tail to zero
               the tail product shrank during training:  r_k <- max(r_min, q), and the tail is dropped for good
               q = 0 (a client of rank 1) leaves no rank without its tail, q = r_k no tail: no penalty then, and no pruning
    server:    B <- sum_k p_k pad(B_k),  A <- sum_k p_k pad(A_k),  p_k proportional to ||B_k A_k||_F over the whole model

Not exact: factors are averaged apart. One scale, alpha / r_max, for everybody: with alpha / r_k a truncation would change the
function. The norms come from traces, O(r^2 (d_out + d_in)), without forming B_k A_k. Where all norms are zero (nothing was
learned) the weights are n_k. What crosses the wire: r_k (d_out + d_in) a module, both ways.
Ours: gamma r is rounded down as the paper writes it (public code rounds to nearest, and then gamma = 0.99 prunes nothing).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.algebra.products import norm
from fedlora.algebra.tensors import padded_mean
from fedlora.errors import BadInput
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, TailNorm, Tensors, Train, value


@dataclass(frozen=True)
class State:
    shared: Factors  # at the largest rank
    ranks: Mapping[int, int]  # client -> its rank now; never grows


@dataclass(frozen=True)
class Up:
    A: Tensors = value("kept", "in")
    B: Tensors = value("out", "kept")


def joint_norm(factors: Factors | Up, first: int = 0) -> float:
    """The Frobenius norm over the whole model of B[:, first:] A[first:, :]."""
    return math.hypot(*(norm((factors.B[m][:, first:], A[first:])) for m, A in factors.A.items()))


@dataclass(frozen=True)
class HetLoRA:
    """gamma: the share of the ranks that are kept when a client prunes. penalty: lambda, the weight of the
    penalty on the last ranks. min_rank: r_min, the least that is left."""

    gamma: float = 0.99
    penalty: float = 0.01
    min_rank: int = 1

    FACTS: ClassVar = Facts(
        title="HetLoRA",
        paper="2401.06432",
        year=2024,
        exact=False,
        mixed_ranks=True,
        personal=False,
        upload="r_k (d_out + d_in)",
        download="r_k (d_out + d_in)",
        server="O(K r^2 d)",
        asks=frozenset({"penalty"}),
        dims=lambda method, setup, client: {"kept": range(1, client.rank + 1)},
    )

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise BadInput("gamma must lie in (0, 1]")
        if self.min_rank < 1:
            raise BadInput("min_rank must be at least 1")

    def init(self, setup: Setup) -> State:
        return State(setup.fresh(setup.all_ranks[-1]), setup.ranks)

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Factors:
        return state.shared.first(state.ranks[client.id])

    def local(self, down: Factors, held: None, client: Client, round: int) -> Local:
        rank = next(iter(down.A.values())).shape[0]
        tail = math.floor(self.gamma * rank)
        has_tail = 0 < tail < rank
        penalty = TailNorm(SHARED, tail, self.penalty) if has_tail else None
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}), penalty=penalty)).slots[SHARED]
        if has_tail and joint_norm(done, tail) < joint_norm(down, tail):
            done = done.first(max(tail, min(self.min_rank, rank)))
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        ranks = dict(state.ranks)

        def term(reply: Reply) -> tuple[float, tuple[Tensors, Tensors]]:
            up = reply.up
            ranks[reply.client.id] = next(iter(up.A.values())).shape[0]
            # The second term decides only where every norm is zero: next to any real norm it is below rounding.
            weight = joint_norm(up) + 1e-60 * reply.client.num_examples
            return weight, (up.A, up.B)

        A, B = padded_mean(map(term, replies), (state.shared.A, state.shared.B))
        return State(replace(state.shared, A=A, B=B), ranks), {"ranks": {str(k): r for k, r in sorted(ranks.items())}}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})
