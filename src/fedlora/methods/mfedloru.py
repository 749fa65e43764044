"""mFedLoRU (Park and Klabjan 2024, arXiv 2409.12371): FedLoRU where a client of smaller budget factors the factors.

Everybody's adapter is s B A at the largest rank r, s = alpha / r. A client with r_k < r trains nested factors of inner rank r_k

    A_k = P Q,  P (r, r_k),  Q (r_k, d_in);       B_k = L P^+,  L (d_out, r_k),  P^+ (r_k, r);       B_k A_k = L Q  since P^+ P = I

    client k:  trains (L_k, Q_k), an ordinary adapter of rank r_k; with r_k = r it trains (B, A) themselves
    server:    A <- A + sum_k w_k P dQ_k,   B <- B + sum_k w_k dL_k P^+,   w_k = n_k / sum of n over the participants
    every tau rounds:  W <- W + s B A  on everybody; A is drawn anew, B is zero

Changes are averaged, not P Q_k and L_k P^+ themselves: those lack every direction that a small client cannot hold, so that a mean
of them loses it, round after round, even where nobody trains. Where everybody has rank r this is FedLoRU.

Not exact: the factors are averaged apart. What crosses the wire: up, the changes of L_k and Q_k, r_k (d_out + d_in) a module; down,
L and Q, and the (A, B) of every merge that the client missed, r (d_out + d_in) each, or the dense sum of all where that is smaller.
P never travels: the server alone needs it.

Ours: the paper says neither which parts start where nor how A and B are factored again each round. Here the outer two of the four
parts train, and L Q starts as the best approximation of B A at rank r_k: with B A = U S V', Q is V' cut to r_k rows, P = A V cut
to r_k columns and L = B P. While B is zero, V spans the first r_k rows of A. Where A lacks ranks, so does P, and P^+ leaves out
singular values of P that are rounding. tau is an eighth of the run, as in FedLoRU's public code, which has no mFedLoRU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.algebra.cycle import cycle_length
from fedlora.algebra.tensors import each, minus, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.history import History, append, everything, missed, noting, restart
from fedlora.types import (
    SHARED,
    BaseUpdate,
    Client,
    Diagnostics,
    Factors,
    Facts,
    Local,
    Model,
    Reply,
    Setup,
    Tensors,
    Train,
    change,
)


@dataclass(frozen=True)
class State:
    cycle: int  # tau
    seed: int
    shared: Factors  # at the largest rank
    merged: History = History()


@dataclass(frozen=True)
class Down:
    base: BaseUpdate
    inner: Factors  # B is L, A is Q


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")  # of Q
    B: Tensors = change("out", "rank")  # of L


def nest(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """L (d_out, rank), Q (rank, d_in) and P (r, rank) of a module, at a rank below r: see above. Computed in float64.

    With A' = V0 T (QR) and B T' = U S Z' (SVD), V = V0 Z. At most d_in columns of V exist: past them everything is zero.
    """
    dtype, B, A = B.dtype, B.to(torch.float64), A.to(torch.float64)
    V0, T = torch.linalg.qr(A.mT)
    square = torch.linalg.qr(B @ T.mT).R  # the right singular vectors of B T', without its long side
    V = V0 @ torch.linalg.svd(square).Vh.mT[:, :rank]
    V = torch.nn.functional.pad(V, (0, rank - V.shape[1]))
    P = A @ V
    return (B @ P).to(dtype).contiguous(), V.mT.to(dtype).contiguous(), P.to(dtype).contiguous()


def inverse(P: Tensor) -> Tensor:
    """P^+ (rank, r). A direction that A lacks is one that P lacks, but for rounding: it counts as zero, and what a client learns in
    it comes to nothing."""
    cut = max(P.shape) * torch.finfo(P.dtype).eps
    pseudo: Tensor = torch.linalg.pinv(P.to(torch.float64), rtol=cut)
    return pseudo.to(P.dtype)


def nested(shared: Factors, rank: int) -> tuple[Factors, dict[str, Tensor]]:
    """The factors that a client of this rank trains, and P by module, which is empty for the full rank."""
    if all(len(A) == rank for A in shared.A.values()):
        return shared, {}
    parts = {m: nest(shared.B[m], A, rank) for m, A in shared.A.items()}
    inner = replace(shared, A={m: Q for m, (_, Q, _) in parts.items()}, B={m: L for m, (L, _, _) in parts.items()})
    return inner, {m: P for m, (_, _, P) in parts.items()}


@dataclass(frozen=True)
class MFedLoRU:
    """period: tau, the rounds from one merge to the next; below 1, a share of the run's rounds."""

    period: float = 0.125

    FACTS: ClassVar = Facts(
        title="mFedLoRU",
        paper="2409.12371",
        year=2024,
        exact=False,
        mixed_ranks=True,
        personal=False,
        upload="r_k (d_out + d_in)",
        download="r_k (d_out + d_in), and r (d_out + d_in) for every merge missed",
        server="O(K r r_k d + r^2 d), r = max r_k",
        asks=frozenset({"base"}),
        linear=lambda method, setup, round: len(setup.all_ranks) == 1,
    )

    def __post_init__(self) -> None:
        if not self.period > 0:
            raise BadInput("period must be positive")

    def init(self, setup: Setup) -> State:
        return State(cycle_length(self.period, setup.rounds), setup.seed, setup.fresh(setup.all_ranks[-1]))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        return Down(missed(state.merged, client, since), nested(state.shared, client.rank)[0])

    def local(self, down: Down, held: None, client: Client, round: int) -> Local:
        ask = Train({SHARED: down.inner}, frozenset({(SHARED, "A"), (SHARED, "B")}), base=down.base)
        done = (yield ask).slots[SHARED]
        return Up(A=minus(done.A, down.inner.A), B=minus(done.B, down.inner.B)), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        shared, outer = state.shared, dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]()  # rank -> P and P^+

        def widened(reply: Reply) -> tuple[float, tuple[Tensors, Tensors]]:
            rank = reply.client.rank
            if rank not in outer:
                P = nested(shared, rank)[1]
                outer[rank] = P, each(inverse, P)
            P, back = outer[rank]
            dA, dB = reply.up.A, reply.up.B
            return reply.client.num_examples, (each(torch.matmul, P, dA), each(torch.matmul, dB, back)) if P else (dA, dB)

        merged, replies = noting(state.merged, replies)
        dA, dB = weighted_mean(map(widened, replies))
        shared = replace(shared, A=plus(shared.A, dA), B=plus(shared.B, dB))
        if round % state.cycle == 0:
            merged = append(merged, shared)
            shared = restart(shared, state.seed, merged.version)
        return replace(state, shared=shared, merged=merged), {"merges": merged.version}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared}, everything(state.merged))
