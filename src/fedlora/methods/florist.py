"""FLoRIST (Ramesh and Dass 2025, arXiv 2506.09199): the mean of the products, cut to the ranks that carry its energy.

    W_g = sum_k w_k s_k B_k A_k = U S V',   w_k = n_k / sum of n over the participants,  s_k = alpha / r_k
    p   = the smallest with sum_{i <= p} S_i^2 >= tau sum_i S_i^2, in every module
    global adapter:  B = U[:, :p] S[:p],  A = V[:, :p]'
    client k receives its first min(p, r_k) ranks (B over s_k), and fills up to r_k with B = 0 and the rows of A that the seed gives

Exact only for tau = 1: otherwise ||W_g - B A||_F^2 is the energy that was cut, at most 1 - tau of the whole. The SVD works on the
stacked factors, by an (R, R) core with R = sum_k r_k: O(d R^2 + R^3), or on their product where that is cheaper. What crosses the
wire: up, r_k (d_out + d_in) a module; down, min(p, r_k) (d_out + d_in), nothing in round 1.

Ours: p is at least 1; where p is above r_k a client gets the best r_k ranks, and what it learns on them replaces the whole in the
next mean.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.algebra.lowrank import energy_rank, leading, pad_rank
from fedlora.algebra.products import mean_of_products
from fedlora.algebra.tensors import each
from fedlora.errors import BadInput
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, value


@dataclass(frozen=True)
class State:
    shared: Factors  # the global adapter at scale 1: B = U S, A = V'; each module at its own p
    scale: Mapping[int, float]  # rank -> s


@dataclass(frozen=True)
class Up:
    A: Tensors = value("rank", "in")
    B: Tensors = value("out", "rank")


@dataclass(frozen=True)
class FLoRIST:
    """tau: the share of the energy, the sum of squared singular values, that is kept; 1 keeps all."""

    tau: float = 0.95

    FACTS: ClassVar = Facts(
        title="FLoRIST",
        paper="2506.09199",
        year=2025,
        exact=False,
        mixed_ranks=True,
        personal=False,
        upload="r_k (d_out + d_in)",
        download="min(p, r_k) (d_out + d_in)",
        server="O(d R^2 + R^3), R = sum r_k",
    )

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise BadInput("tau must lie in (0, 1]")

    def init(self, setup: Setup) -> State:
        fresh = setup.fresh(1)
        empty = Factors(each(lambda A: A[:0].clone(), fresh.A), each(lambda B: B[:, :0].clone(), fresh.B), 1.0)
        return State(empty, {r: setup.scaling(r) for r in setup.ranks.values()})

    def hold(self, setup: Setup, client: Client) -> Tensors:
        return setup.fresh(client.rank).A

    def send(self, state: State, client: Client) -> Factors:
        r, s = client.rank, state.scale[client.rank]
        return Factors(each(lambda A: A[:r], state.shared.A), each(lambda B: B[:, :r] / s, state.shared.B), s)

    def local(self, down: Factors, held: Tensors, client: Client) -> Local:
        A = each(lambda A, fresh: torch.cat([A, fresh[len(A) :]]), down.A, held)
        start = Factors(A, each(lambda B, A: pad_rank(B, A, client.rank)[0], down.B, down.A), down.scale)
        done = (yield Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply]) -> tuple[State, Diagnostics]:
        terms = ((r.client.num_examples, state.scale[r.client.rank], r.up.B, r.up.A) for r in replies)
        A, B = {}, {}
        for m, mean in mean_of_products(terms).items():
            scaled, Vt = leading(mean, min(state.shared.B[m].shape[0], state.shared.A[m].shape[1]))
            p = max(1, energy_rank(torch.linalg.vector_norm(scaled, dim=0, dtype=torch.float64), self.tau))
            A[m], B[m] = Vt[:p], scaled[:, :p].contiguous()
        return State(Factors(A, B, 1.0), state.scale), {"ranks": {m: len(x) for m, x in A.items()}}

    def deploy(self, state: State, client: Client | None = None, held: Tensors | None = None) -> Model:
        return Model({SHARED: state.shared})
