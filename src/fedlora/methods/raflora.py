"""raFLoRA (2026, arXiv 2602.13486): FlexLoRA whose mean is taken of each slice of ranks over the clients that have it.

    levels      0 = rho_0 < rho_1 < ... < rho_L, the distinct ranks of all clients of the run; slice h holds ranks l+1 .. h,
                (l, h] = (rho_{i-1}, rho_i]
    dW_h        = sum over participants with r_k >= h of (n_k / N_h) s_k B_k[:, l:h] A_k[l:h],   N_h = their examples
    W_g         = sum_h dW_h = U S V',  cut to rank rho_L
    client k receives  B = U[:, :r_k] S[:r_k] / s_k,   A = V[:, :r_k]'

FlexLoRA divides every slice by the examples of all participants, so without any training it multiplies direction i by the share
W_i of those with r_k >= i in every round: what the upper ranks hold drains to the lowest geometrically ("rank collapse" in the
paper). Here clients that train nothing leave the model as it is, and with equal ranks it is FlexLoRA, bit for bit. It is no mean of
the products s_k B_k A_k: upper slices count 1 / W_i times as much. The SVD works as FlexLoRA's, on the stacked factors, and ranks
without energy have B zero and A orthonormal, so that they can learn. What crosses the wire: r_k (d_out + d_in) a module, both ways.

Ours, where the paper's algorithm is silent: a slice that no participant has stays as the server's model has it, the sum over i in
(l, h] of U_i S_i V_i' (left out, it would be forgotten whenever the largest clients sit out); weights are n_k; S stands in B, where
S^1/2 on both sides would leave directions without energy dead; one scale for all clients, alpha / rho_L, or FlexLoRA's alpha / r_k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from fedlora.algebra.lowrank import at_rank
from fedlora.algebra.products import mean_of_products, total
from fedlora.algebra.tensors import each
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, value

Slices = dict[tuple[str, int], Tensor]  # (module, h) -> the ranks (l, h] of a factor


class Scale(Enum):
    """Whose rank s is alpha over."""

    ONE = "one-scale"  # alpha / rho_L, for every client
    OWN = "own-scale"  # alpha / r_k, as FlexLoRA


@dataclass(frozen=True)
class State:
    shared: Factors  # at rank rho_L and scale 1: B = U S, A = V'
    scale: dict[int, float]  # rank -> s, for every rank of the run

    @property
    def slices(self) -> list[tuple[int, int]]:
        """(l, h) of every slice, from the lowest."""
        return list(pairwise([0, *sorted(self.scale)]))


@dataclass(frozen=True)
class Up:
    A: Tensors = value("rank", "in")
    B: Tensors = value("out", "rank")


@dataclass(frozen=True)
class RaFLoRA:
    """scale: s in s B A. What a client receives is the same; how far its training goes is not."""

    scale: Scale = Scale.ONE

    FACTS: ClassVar = Facts(
        title="raFLoRA",
        paper="2602.13486",
        year=2026,
        exact=False,
        mixed_ranks=True,
        personal=False,
        upload="r_k (d_out + d_in)",
        download="r_k (d_out + d_in)",
        server="O(d R^2 + R^3), R = sum r_k",
    )

    def init(self, setup: Setup) -> State:
        largest = setup.all_ranks[-1]
        fresh = setup.fresh(largest)
        scale = {r: setup.scaling(largest if self.scale is Scale.ONE else r) for r in setup.all_ranks}
        return State(Factors(fresh.A, fresh.B, 1.0), scale)

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Factors:
        r, s = client.rank, state.scale[client.rank]
        return Factors(each(lambda A: A[:r], state.shared.A), each(lambda B: B[:, :r] / s, state.shared.B), s)

    def local(self, down: Factors, held: None, client: Client, round: int) -> Local:
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        # A slice is one more module of those that have it, so that its weights sum to 1 over them.
        means = mean_of_products(_sliced(state, reply) for reply in replies)
        A, B = {}, {}
        for m, before in state.shared.A.items():
            own = {h: (state.shared.B[m][:, low:h], before[low:h]) for low, h in state.slices}
            B[m], A[m] = at_rank(total([means.get((m, h), own[h]) for h in own]), len(before))
        return State(Factors(A, B, 1.0), state.scale), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})


def _sliced(state: State, reply: Reply) -> tuple[float, float, Slices, Slices]:
    """n_k, s_k, and the slices of B_k and A_k that the client has."""
    rank = reply.client.rank
    has = [(low, h) for low, h in state.slices if h <= rank]
    B = {(m, h): B[:, low:h] for m, B in reply.up.B.items() for low, h in has}
    A = {(m, h): A[low:h] for m, A in reply.up.A.items() for low, h in has}
    return reply.client.num_examples, state.scale[rank], B, A
