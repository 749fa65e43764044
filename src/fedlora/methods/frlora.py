"""FRLoRA (Yan et al., ICLR 2025): every round starts from the same principal factors, and the base takes up what was learned.

    start:   U S V' = SVD(W), top r:   B_0 = U (S / s)^1/2,  A_0 = (S / s)^1/2 V',   W <- W - s B_0 A_0   (function unchanged)
    client:  trains (A, B) from (A_0, B_0)
    server:  A = mean_k A_k,  B = mean_k B_k
    everybody:  W <- W + s (B A - B_0 A_0), and starts the next round at (A_0, B_0) again

Not exact: B A is a product of means. What is merged has rank up to 2 r a round, so the sum over rounds is not bound to rank r.
What crosses the wire: up, the changes from (A_0, B_0), r (d_out + d_in) a module; down, (A, B) of every round that a client
missed, r (d_out + d_in) each, or the dense sum where that is smaller. Clients compute A_0 and B_0 themselves from the pre-trained
weights, once: they and the first change of the base cost no bytes.

The public code's mean is uniform over clients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.algebra.lowrank import principal
from fedlora.algebra.tensors import each, minus, plus, weighted_mean
from fedlora.history import History, append, everything, missed, noting, numbers
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
    start: Factors  # (A_0, B_0)
    merged: History


@dataclass(frozen=True)
class Down:
    base: BaseUpdate  # its pairs are `news`


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


def starting_factors(setup: Setup, rank: int) -> Factors:
    """(A_0, B_0), the same on every client and on the server."""
    return _principal(setup.base, tuple(setup.shapes), rank, setup.scaling(rank))


@lru_cache(maxsize=1)  # all clients of a process start alike, and the SVD of a whole model takes seconds
def _principal(base: Callable[[str], Tensor], modules: tuple[str, ...], rank: int, scale: float) -> Factors:
    pairs = {m: principal(base(m), rank) for m in modules}
    return Factors({m: A / scale**0.5 for m, (_, A) in pairs.items()}, {m: B / scale**0.5 for m, (B, _) in pairs.items()}, scale)


def first(start: Factors) -> Factors:
    """Version 1 of the base: - s B_0 A_0."""
    return replace(start, scale=-start.scale)


def step(mean: Factors, start: Factors) -> Factors:
    """s (B A - B_0 A_0) as one pair of rank 2 r."""
    return replace(
        start,
        A=each(lambda A, A0: torch.cat([A, A0]), mean.A, start.A),
        B=each(lambda B, B0: torch.cat([B, -B0], dim=1), mean.B, start.B),
    )


def news(pair: Factors, start: Factors) -> Factors:
    """What of a pair clients do not know: nothing of `first`, the (A, B) of a `step`."""
    r = _rank(start)
    if _rank(pair) == r:
        return Factors()
    return replace(pair, A=each(lambda A: A[:r], pair.A), B=each(lambda B: B[:, :r], pair.B))


def complete(base: BaseUpdate, start: Factors) -> BaseUpdate:
    """An update of news, with what the client knows put back."""
    return replace(base, pairs=tuple(step(pair, start) if pair.A else first(start) for pair in base.pairs))


def _rank(factors: Factors) -> int:
    return next(iter(factors.A.values())).shape[0]


@dataclass(frozen=True)
class FRLoRA:
    """uniform_weights: every client counts the same (the public code); otherwise by its number of examples."""

    uniform_weights: bool = True

    FACTS: ClassVar = Facts(
        title="FRLoRA",
        paper="ICLR 2025",
        year=2025,
        exact=False,
        mixed_ranks=False,
        personal=False,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in) for every round missed",
        server="O(K r d); once, an SVD of every W",
        asks=frozenset({"base"}),
        linear=lambda method, setup, round: True,
        weight=lambda method, client: 1.0 if method.uniform_weights else client.num_examples,
    )

    def init(self, setup: Setup) -> State:
        start = starting_factors(setup, one_rank(setup, self))
        return State(start, append(History(), first(start), lambda pair: numbers(news(pair, start))))

    def hold(self, setup: Setup, client: Client) -> Factors:
        return starting_factors(setup, client.rank)

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        base = missed(state.merged, client, since)
        return Down(replace(base, pairs=tuple(news(pair, state.start) for pair in base.pairs)))

    def local(self, down: Down, held: Factors, client: Client, round: int) -> Local:
        ask = Train({SHARED: held}, frozenset({(SHARED, "A"), (SHARED, "B")}), base=complete(down.base, held))
        done = (yield ask).slots[SHARED]
        return Up(A=minus(done.A, held.A), B=minus(done.B, held.B)), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        start = state.start
        merged, replies = noting(state.merged, replies)
        dA, dB = weighted_mean((1.0 if self.uniform_weights else r.client.num_examples, (r.up.A, r.up.B)) for r in replies)
        mean = replace(start, A=plus(start.A, dA), B=plus(start.B, dB))
        return State(start, append(merged, step(mean, start), lambda pair: numbers(news(pair, start)))), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.start}, everything(state.merged))
