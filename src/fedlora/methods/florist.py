"""FLoRIST (Ramesh and Dass 2025, arXiv 2506.09199): the mean of the products, cut to the ranks that carry its energy.

    W_g = sum_k w_k s_k B_k A_k = U S V',   w_k = n_k / sum of n over the participants,  s_k = alpha / r_k
    p   = the smallest with sum_{i <= p} S_i^2 >= tau sum_i S_i^2, in every module
    global adapter:  B = U[:, :p] S[:p],  A = V[:, :p]'
    client k receives its first min(p, r_k) ranks (B over s_k), and pads both factors with zeros up to r_k

Padded ranks are dead: a row of A and a column of B that are both zero have no gradient, so such a client trains p ranks and not
r_k, and uploads the zeros; p grows again only where the ranks of several clients add up to more. `fresh_rows` fills A up with
the rows that the seed gives instead, which B can learn on. Round 1 starts everywhere from the fresh adapter, B = 0.

Exact only for tau = 1: otherwise ||W_g - B A||_F^2 is the energy that was cut, at most 1 - tau of the whole. The SVD works on the
stacked factors, by an (R, R) core with R = sum_k r_k: O(d R^2 + R^3), or on their product where that is cheaper. What crosses the
wire: up, r_k (d_out + d_in) a module; down, min(p, r_k) (d_out + d_in), nothing in round 1.

Ours: `fresh_rows`; p is at least 1, and singular values that may be nothing but rounding, up to max(d_out, d_in) eps of the
largest, count as zero, so that tau = 1 keeps the numerical rank; where p is above r_k a client gets the best r_k ranks, and what it
learns on them replaces the whole in the next mean.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.algebra.lowrank import energy_rank, leading, pad_rank, rounding
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
    """
    Attributes:
        tau: the share of the energy, the sum of squared singular values, that is kept; 1 keeps all.
        fresh_rows: clients fill A up with the seed's rows, not with zeros (the paper's).
    """

    tau: float = 0.95
    fresh_rows: bool = False

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
        return State(empty, {r: setup.scaling(r) for r in setup.all_ranks})

    def hold(self, setup: Setup, client: Client) -> Tensors:
        return setup.fresh(client.rank).A

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Factors:
        r, s = client.rank, state.scale[client.rank]
        return Factors(each(lambda A: A[:r], state.shared.A), each(lambda B: B[:, :r] / s, state.shared.B), s)

    def local(self, down: Factors, held: Tensors, client: Client, round: int) -> Local:
        def filled(A: Tensor, fresh: Tensor) -> Tensor:
            learns = self.fresh_rows or not len(A)  # nothing comes down in round 1
            return torch.cat([A, fresh[len(A) :] if learns else torch.zeros_like(fresh[len(A) :])])

        B = each(lambda B, A: pad_rank(B, A, client.rank)[0], down.B, down.A)
        start = Factors(each(filled, down.A, held), B, down.scale)
        done = (yield Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        terms = ((r.client.num_examples, state.scale[r.client.rank], r.up.B, r.up.A) for r in replies)
        A, B = {}, {}
        for m, mean in mean_of_products(terms).items():
            d_out, d_in = state.shared.B[m].shape[0], state.shared.A[m].shape[1]
            scaled, Vt = leading(mean, min(d_out, d_in))
            S = torch.linalg.vector_norm(scaled, dim=0, dtype=torch.float64)
            p = max(1, energy_rank(S, self.tau, rounding(d_out, d_in, scaled.dtype)))
            A[m], B[m] = Vt[:p], scaled[:, :p].contiguous()
        return State(Factors(A, B, 1.0), state.scale), {"ranks": {m: len(x) for m, x in A.items()}}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})
