"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): average the factors, and merge what that leaves out into the base.

    server:     A <- sum_k w_k A_k,   B <- sum_k w_k B_k
    residual:   dR = sum_k w_k B_k A_k - B A = sum_k w_k (B_k - B)(A_k - A)
    everybody:  W <- W + s dR, and goes on from (A, B)

Exact: (W + s dR) + s B A = W + s sum_k w_k B_k A_k. With K clients dR has rank (K - 1) r at most, and its factors need no SVD:
blocks w_k (B_k - B) and A_k - A_K for k < K. What crosses the wire: both factors, r (d_out + d_in) a module, both ways, uploads as
changes; down also the residual's factors of every round that a client missed, (K - 1) r (d_out + d_in) each, or their dense sum
where that is smaller. `residual_rank` cuts the residual to its best approximation at that rank; then the round is exact only up to
the singular values that were cut.

The paper's mean is uniform over clients. Ours: the K - 1 blocks (the paper orthogonalises K of them); a residual wider than
min(d_out, d_in) is formed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.algebra.lowrank import leading
from fedlora.algebra.residual import means_and_residuals
from fedlora.algebra.tensors import minus, plus
from fedlora.errors import BadInput
from fedlora.history import History, append_matrices, everything, missed, noting
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
    one_rank,
)


@dataclass(frozen=True)
class State:
    shared: Factors
    merged: History = History()


@dataclass(frozen=True)
class Down:
    shared: Factors
    base: BaseUpdate


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class FedExLoRA:
    """residual_rank: the rank that the residual is cut to; None sends all of it. uniform_weights: every client counts the same
    (the paper); otherwise by its number of examples."""

    residual_rank: int | None = None
    uniform_weights: bool = True

    FACTS: ClassVar = Facts(
        title="FedEx-LoRA",
        paper="2410.09432",
        year=2024,
        exact=True,
        mixed_ranks=False,
        personal=False,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in), and (K - 1) r (d_out + d_in) for every round missed",
        server="O(K r d); a cut residual O(d (K r)^2 + (K r)^3)",
        asks=frozenset({"base"}),
    )

    def __post_init__(self) -> None:
        if self.residual_rank is not None and self.residual_rank < 1:
            raise BadInput("residual_rank must be at least 1, or left out")

    def init(self, setup: Setup) -> State:
        return State(setup.fresh(one_rank(setup, self)))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        return Down(state.shared, missed(state.merged, client, since))

    def local(self, down: Down, held: None, client: Client, round: int) -> Local:
        start = down.shared
        done = (yield Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}), base=down.base)).slots[SHARED]
        return Up(A=minus(done.A, start.A), B=minus(done.B, start.B)), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        shared = state.shared
        merged, replies = noting(state.merged, replies)
        terms = ((1.0 if self.uniform_weights else r.client.num_examples, (r.up.A, r.up.B)) for r in replies)
        dA, dB, lacking = means_and_residuals(terms)  # the start is common, so the residual of the changes is that of the factors
        if self.residual_rank is not None:
            lacking = {m: leading(M, self.residual_rank) for m, M in lacking.items()}
        moved = replace(shared, A=plus(shared.A, dA), B=plus(shared.B, dB))
        return State(moved, append_matrices(merged, lacking, shared.scale)), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared}, everything(state.merged))
