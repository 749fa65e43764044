"""FSLoRA (Fang et al. 2025, arXiv 2501.19389): each client trains a random sketch of one adapter of a larger rank.

The adapter has a global rank r. In every round client k gets a set of its k_k ranks, drawn uniformly and anew, the same for A and B
and for all modules: the diagonal S_k is r / k_k on the set and 0 elsewhere, so E[S_k] = I. It trains W + s B S_k A, where the
columns of B and rows of A outside the set neither count nor move, and the server adds the changes:

    B <- B + sum_k p_k dB_k,   A <- A + sum_k p_k dA_k,   p_k = 1 / participants, where what a client did not train counts as zero

Not exact: the two factors vary together over the clients, and the server's model has no sketch, S = I. With k_k = r for all it is
FedIT with uniform weights. What crosses the wire: the chosen columns and rows, k_k (d_out + d_in) a module, both ways, for B S_k A
reads no others; and one bit for each of the r ranks, once for all modules. A client that trains the chosen ranks alone, with
C = r / k_k, does what the paper's masking does, with Adam and weight decay too; the scaled B of the published code does not.

Ours where the paper is silent: the server's step is the plain mean of its equation (5), where its code has AdamW; one set for all
modules, where it is written for one; r is 16, or the largest client rank where that is more (theirs is 64); s = alpha / r.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora import seeds
from fedlora.algebra.tensors import each, minus, plus
from fedlora.errors import BadInput
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, index


@dataclass(frozen=True)
class State:
    seed: int
    shared: Factors  # at rank r


@dataclass(frozen=True)
class Down:
    sketch: Factors  # the chosen ranks
    ranks: Tensor  # which they are, (r,) bool


@dataclass(frozen=True)
class Up:
    A: Tensors = change("sketch", "in")
    B: Tensors = change("out", "sketch")
    ranks: Tensors = index("sketch", "global")  # one tensor for all modules, so it travels once


@dataclass(frozen=True)
class FSLoRA:
    """
    Attributes:
        global_rank: r; raised to the largest client rank.
        uniform_weights: every participant counts the same (the paper's); otherwise by number of examples.
    """

    global_rank: int = 16
    uniform_weights: bool = True

    FACTS: ClassVar = Facts(
        title="FSLoRA",
        paper="2501.19389",
        year=2025,
        exact=False,
        mixed_ranks=True,
        personal=False,
        upload="r_k (d_out + d_in)",
        download="r_k (d_out + d_in)",
        server="O(K r_k d)",
        asks=frozenset({"C"}),
        linear=lambda method, setup, round: True,
        weight=lambda method, client: 1.0 if method.uniform_weights else client.num_examples,
        dims=lambda method, setup, client: {"global": method._rank(setup), "sketch": client.rank},
    )

    def __post_init__(self) -> None:
        if self.global_rank < 1:
            raise BadInput("global_rank must be at least 1")

    def _rank(self, setup: Setup) -> int:
        return max(self.global_rank, *setup.all_ranks)

    def init(self, setup: Setup) -> State:
        return State(setup.seed, setup.fresh(self._rank(setup)))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        shared = state.shared
        rank = next(A.shape[0] for A in shared.A.values())
        drawn = seeds.generator(state.seed, "sketch", round, client.id).permutation(rank)[: client.rank]
        ranks = torch.zeros(rank, dtype=torch.bool)
        ranks[torch.from_numpy(drawn)] = True
        A, B = each(lambda x: x[ranks], shared.A), each(lambda x: x[:, ranks], shared.B)
        return Down(Factors(A, B, shared.scale), ranks)

    def local(self, down: Down, held: None, client: Client, round: int) -> Local:
        weight = len(down.ranks) / client.rank
        C = each(lambda A: A.new_full((A.shape[0],), weight), down.sketch.A)
        start = replace(down.sketch, C=C)
        done = (yield Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(minus(done.A, start.A), minus(done.B, start.B), dict.fromkeys(start.A, down.ranks)), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        shared = state.shared
        A, B = ({m: torch.zeros_like(x, dtype=torch.float64) for m, x in factor.items()} for factor in (shared.A, shared.B))
        total = 0
        for reply in replies:
            weight = 1 if self.uniform_weights else reply.client.num_examples
            total += weight
            for m, ranks in reply.up.ranks.items():
                A[m][ranks] += weight * reply.up.A[m].double()
                B[m][:, ranks] += weight * reply.up.B[m].double()

        def mean(sums: Tensors, like: Tensors) -> dict[str, Tensor]:
            return each(lambda x, y: (x / total).to(y.dtype), sums, like)

        moved = replace(shared, A=plus(shared.A, mean(A, shared.A)), B=plus(shared.B, mean(B, shared.B)))
        return State(state.seed, moved), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})
