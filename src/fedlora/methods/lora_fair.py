"""LoRA-FAIR (Bian et al., ICCV 2025, arXiv 2411.14961): average the factors, then correct B on the server for what that leaves out.

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   M = sum_k p_k B_k A_k,   p_k = n_k / sum of n
    X = argmin 1 - cos(M, (B + X) A) + lambda ||X||_F,   B <- B + X

The norm is not squared: X = 0, which is FedIT, wherever the cosine's gradient there is no longer than lambda. The cosine does not
see the length of B + X; the norm of X holds it. No d_out x d_in matrix is formed while the clients have no more ranks than it has.

Not exact: the correction reduces the error of averaging apart, only as far as the rows of A reach. What crosses the wire: both
factors, r (d_out + d_in) a module, both ways; uploads as changes.

Ours: the paper's similarity turned into a distance; proximal gradient from X = 0 in its place of SGD, in float64; and, as another
objective, `ridge`: X = argmin ||M - (B + X) A||_F^2 + lambda ||X||_F^2 = (M - B A) A' (A A' + lambda I)^-1, which goes from
FedIT, as lambda grows, to the best approximation of M in the row space of A.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

from torch import Tensor

from fedlora.algebra.residual import cosine_correction, means_and_residuals, ridge_correction
from fedlora.algebra.tensors import each, minus, plus
from fedlora.errors import BadInput
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank


class Objective(Enum):
    """What the correction makes small."""

    COSINE = "cosine"  # the paper's
    RIDGE = "ridge"


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class LoRAFAIR:
    """objective: what the residual is fitted by. penalty: lambda, the weight of the
    correction's size. steps: the most iterations of the cosine objective."""

    objective: Objective = Objective.COSINE
    penalty: float = 0.01
    steps: int = 500

    FACTS: ClassVar = Facts(
        title="LoRA-FAIR",
        paper="2411.14961",
        year=2024,
        exact=False,
        mixed_ranks=False,
        personal=False,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in)",
        server="O(K r^2 d), and O(r^3) a step",
    )

    def __post_init__(self) -> None:
        if self.penalty <= 0 or self.steps < 1:
            raise BadInput("penalty must be positive and steps at least 1")

    def init(self, setup: Setup) -> Factors:
        return setup.fresh(one_rank(setup, self))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: Factors, client: Client, round: int, since: int | None = None) -> Factors:
        return state

    def local(self, down: Factors, held: None, client: Client, round: int) -> Local:
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(A=minus(done.A, down.A), B=minus(done.B, down.B)), held

    def aggregate(self, state: Factors, replies: Iterator[Reply], round: int) -> tuple[Factors, Diagnostics]:
        # The start is common, so the residual of the changes is that of the factors. In float64: products of products of large
        # changes, which one odd client is enough for, would not fit into less.
        terms = ((r.client.num_examples, (each(Tensor.double, r.up.A), each(Tensor.double, r.up.B))) for r in replies)
        dA, dB, lacking = means_and_residuals(terms)
        corrected = {}
        A, B = plus(state.A, dA), plus(state.B, dB)
        for m, residual in lacking.items():
            if self.objective is Objective.RIDGE:
                correction = ridge_correction(A[m], residual, self.penalty)
            else:
                correction = cosine_correction(B[m], A[m], residual, self.penalty, self.steps)
            corrected[m] = (B[m] + correction).to(state.B[m].dtype)
        A = each(lambda x, like: x.to(like.dtype), A, state.A)
        return replace(state, A=A, B=corrected), {}

    def deploy(self, state: Factors) -> Model:
        return Model({SHARED: state})
