"""LoRA-FAIR (Bian et al., ICCV 2025, arXiv 2411.14961): average the factors, then correct B on the server for what that leaves out.

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   M = sum_k p_k B_k A_k,   p_k = n_k / sum of n
    X = argmin S(M, (B + X) A) + lambda ||X||_F^2,   B <- B + X

`ridge` takes S = ||M - (B + X) A||_F^2, which has a closed form: X = (M - B A) A' (A A' + lambda I)^-1. As lambda grows it becomes
FedIT; as lambda falls, the best approximation of M in the row space of A. `cosine` takes S = 1 - cos(M, (B + X) A), the paper's
similarity turned into a distance; cos does not see the length, so the penalty holds it. Neither forms a d_out x d_in matrix while
the clients have no more ranks than that has.

Not exact: the correction reduces the error of averaging apart, only as far as the rows of A reach. What crosses the wire: both
factors, r (d_out + d_in) a module, both ways; uploads as changes.

Ours: the closed form is the default (the paper's server runs SGD on the cosine); the cosine is solved by iterating its
stationarity condition; the square on ||X||, which makes both smooth at X = 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

from fedlora.algebra.residual import cosine_correction, means_and_residuals, ridge_correction
from fedlora.algebra.tensors import minus, plus
from fedlora.errors import BadInput
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank


class Objective(Enum):
    """What the correction makes small."""

    RIDGE = "ridge"
    COSINE = "cosine"


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class LoRAFAIR:
    """penalty: lambda above. steps: iterations of the cosine objective."""

    objective: Objective = Objective.RIDGE
    penalty: float = 0.01
    steps: int = 100

    FACTS: ClassVar = Facts(
        title="LoRA-FAIR",
        paper="2411.14961",
        year=2024,
        exact=False,
        mixed_ranks=False,
        personal=False,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in)",
        server="O(K r^2 d + r^3)",
    )

    def __post_init__(self) -> None:
        if self.penalty <= 0 or self.steps < 1:
            raise BadInput("penalty must be positive and steps at least 1")

    def init(self, setup: Setup) -> Factors:
        return setup.fresh(one_rank(setup, self))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: Factors, client: Client) -> Factors:
        return state

    def local(self, down: Factors, held: None, client: Client) -> Local:
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(A=minus(done.A, down.A), B=minus(done.B, down.B)), held

    def aggregate(self, state: Factors, replies: Iterator[Reply]) -> tuple[Factors, Diagnostics]:
        # The start is common, so the residual of the changes is that of the factors.
        dA, dB, lacking = means_and_residuals((r.client.num_examples, (r.up.A, r.up.B)) for r in replies)
        A, B = plus(state.A, dA), dict(plus(state.B, dB))
        for m, x in B.items():
            if self.objective is Objective.RIDGE:
                correction = ridge_correction(A[m], lacking[m], self.penalty)
            else:
                correction = cosine_correction(x, A[m], lacking[m], self.penalty, self.steps)
            B[m] = x + correction.to(x.dtype)
        return replace(state, A=A, B=B), {}

    def deploy(self, state: Factors, client: Client | None = None, held: None = None) -> Model:
        return Model({SHARED: state})
