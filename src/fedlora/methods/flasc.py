"""FLASC (Kuo et al. 2024, arXiv 2406.05233): sparse messages around dense local training.

P is every entry of both factors of all modules as one vector of length n. In each round

    down     the server sends the floor(density_down n) entries of P of largest magnitude: P * M
    train    the client trains all of P from P * M, nothing frozen
    up       of dP = P_k - P * M it sends the floor(density_up n) entries of largest magnitude
    server   P <- optimiser's step along the mean of the dP_k: plain addition (SGD at rate 1), or Adam

Masks differ between clients and rounds. Not exact; with both densities 1 and SGD at rate 1 it is FedIT with uniform weights.
What crosses the wire, both ways: the entries, and a bit for each of the n that says which they are. Zeros are never sent, so there
are fewer entries where P has fewer: in round 1, B = 0.

Ours where the paper leaves it open: Adam has no weight decay (their code inherits 0.01 from AdamW's default); the deployed model is
P, not P * M; one rank for all, while their code also gives tiers of clients their own densities.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.algebra.sparse import largest, spread
from fedlora.algebra.tensors import each, minus, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.types import (
    SHARED,
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
    index,
    one_rank,
)


class Optimizer(Enum):
    """The server's optimiser; its gradient is minus the mean change."""

    SGD = "sgd"  # at rate 1, plain averaging
    ADAM = "adam"


@dataclass(frozen=True)
class Moments:
    """Adam's, of both factors."""

    step: int
    first_A: Tensors
    first_B: Tensors
    second_A: Tensors
    second_B: Tensors


@dataclass(frozen=True)
class State:
    shared: Factors
    moments: Moments | None = None  # none before Adam's first step


@dataclass(frozen=True)
class Down:
    A: Tensors  # the entries sent, flat, in the order of the factor's rows
    B: Tensors
    where_A: Tensors  # which they are: bool, of the factor's shape
    where_B: Tensors
    scale: float


@dataclass(frozen=True)
class Up:
    A: Tensors = change("kept_A")
    B: Tensors = change("kept_B")
    where_A: Tensors = index("kept_A", "rank*in")
    where_B: Tensors = index("kept_B", "out*rank")


@dataclass(frozen=True)
class FLASC:
    """
    Attributes:
        density_down, density_up: the share of all entries that travels.
        server: the server's optimiser.
        server_lr: its rate; None is 1 for SGD and 0.001 for Adam.
        uniform_weights: every participant counts the same (the paper's code); otherwise by number of examples.
    """

    density_down: float = 0.25
    density_up: float = 0.25
    server: Optimizer = Optimizer.ADAM
    server_lr: float | None = None
    uniform_weights: bool = True

    FACTS: ClassVar = Facts(
        title="FLASC",
        paper="2406.05233",
        year=2024,
        exact=False,
        mixed_ranks=False,
        personal=False,
        upload="density_up r (d_out + d_in), and a bit an entry",
        download="density_down r (d_out + d_in), and a bit an entry",
        server="O(K r d)",
        linear=lambda method, setup, round: True,
        weight=lambda method, client: 1.0 if method.uniform_weights else client.num_examples,
        budget=lambda method, setup, client: {
            ("kept_A", "kept_B"): _count(method.density_up, sum(client.rank * (o + i) for o, i in setup.shapes.values()))
        },
    )

    def __post_init__(self) -> None:
        if not (0 < self.density_down <= 1 and 0 < self.density_up <= 1):
            raise BadInput("density_down and density_up lie in (0, 1]")
        if self.server_lr is not None and self.server_lr <= 0:
            raise BadInput("server_lr must be positive")

    def init(self, setup: Setup) -> State:
        return State(setup.fresh(one_rank(setup, self)))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        A, B = state.shared.A, state.shared.B
        where_A, where_B = _largest(A, B, self.density_down)
        return Down(each(_pick, A, where_A), each(_pick, B, where_B), where_A, where_B, state.shared.scale)

    def local(self, down: Down, held: None, client: Client, round: int) -> Local:
        start = Factors(each(spread, down.A, down.where_A), each(spread, down.B, down.where_B), down.scale)
        done = (yield Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        A, B = minus(done.A, start.A), minus(done.B, start.B)
        where_A, where_B = _largest(A, B, self.density_up)
        flat_A, flat_B = each(torch.flatten, where_A), each(torch.flatten, where_B)
        return Up(each(_pick, A, where_A), each(_pick, B, where_B), flat_A, flat_B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        shared = state.shared

        def dense(up: Up) -> tuple[Tensors, Tensors]:
            return (
                {m: spread(up.A[m], up.where_A[m]).view_as(x) for m, x in shared.A.items()},
                {m: spread(up.B[m], up.where_B[m]).view_as(x) for m, x in shared.B.items()},
            )

        A, B = weighted_mean((1 if self.uniform_weights else r.client.num_examples, dense(r.up)) for r in replies)
        moments = state.moments
        if self.server is Optimizer.ADAM:
            moments = _follow(moments, A, B)
            A, B = _direction(moments)
        lr = self._lr
        A, B = each(lambda x: lr * x, A), each(lambda x: lr * x, B)
        return State(Factors(plus(shared.A, A), plus(shared.B, B), shared.scale), moments), {}

    @property
    def _lr(self) -> float:
        if self.server_lr is not None:
            return self.server_lr
        return 1.0 if self.server is Optimizer.SGD else 1e-3

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})


# Adam's own constants, as the paper's code leaves them.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def _largest(A: Tensors, B: Tensors, density: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks of the largest entries of both factors together."""
    both = {f"A {m}": x for m, x in A.items()} | {f"B {m}": x for m, x in B.items()}
    where = largest(both, _count(density, sum(x.numel() for x in both.values())))
    return {m: where[f"A {m}"] for m in A}, {m: where[f"B {m}"] for m in B}


def _count(density: float, entries: int) -> int:
    """How many of the entries travel; one at least."""
    return max(1, floor(density * entries))


def _pick(x: Tensor, where: Tensor) -> Tensor:
    return x[where]


def _follow(before: Moments | None, A: Tensors, B: Tensors) -> Moments:
    """Adam's moments after one more mean change."""
    if before is None:
        zero_A, zero_B = each(torch.zeros_like, A), each(torch.zeros_like, B)
        before = Moments(0, zero_A, zero_B, zero_A, zero_B)

    def first(m: Tensor, g: Tensor) -> Tensor:
        return BETA1 * m + (1 - BETA1) * g

    def second(v: Tensor, g: Tensor) -> Tensor:
        return BETA2 * v + (1 - BETA2) * g.square()

    return Moments(
        before.step + 1,
        each(first, before.first_A, A),
        each(first, before.first_B, B),
        each(second, before.second_A, A),
        each(second, before.second_B, B),
    )


def _direction(moments: Moments) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adam's step at rate 1, for both factors."""
    fix1, fix2 = 1 - BETA1**moments.step, 1 - BETA2**moments.step

    def step(m: Tensor, v: Tensor) -> Tensor:
        return (m / fix1) / ((v / fix2).sqrt() + EPSILON)

    return each(step, moments.first_A, moments.second_A), each(step, moments.first_B, moments.second_B)
