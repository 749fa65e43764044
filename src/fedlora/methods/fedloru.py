"""FedLoRU (Park and Klabjan 2024, arXiv 2409.12371): a low-rank update is trained for some rounds, then merged, and again.

    every round:       A <- A + sum_k w_k dA_k,   B <- B + sum_k w_k dB_k,   w_k = n_k / sum of n over the participants
    every tau rounds:  W <- W + s B A  on everybody, and a new cycle begins

Not exact: the factors are averaged apart, as in FedIT, which this is while nothing was merged. The sum of the merges is not bound
to rank r. What crosses the wire: up, the changes of both factors, r (d_out + d_in) a module; down, both factors, and the (A, B) of
every merge that the client missed, r (d_out + d_in) each, or the dense sum of all where that is smaller.

What the next cycle begins with, the paper does not say. REINIT, the default: A is drawn anew and B is zero, so that the function
goes on where it was. LITERAL, the paper's algorithm as it stands: A and B go on as they are; s B A then counts twice, in W and
beside it, and the function jumps by it at the start of every cycle after the first. (The public code has both.)

Ours: where tau does not divide the run, the model at the end is W with the live adapter; the paper returns W. In LITERAL the model
right after a merge is W without it, which is the function that was trained. tau is an eighth of the run, as in the public code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

from fedlora.algebra.cycle import cycle_length
from fedlora.algebra.tensors import minus, plus, weighted_mean
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
    one_rank,
)


class Accumulate(Enum):
    """What the adapter is after a merge."""

    REINIT = "reinit"  # drawn anew
    LITERAL = "literal"  # the same as before


@dataclass(frozen=True)
class State:
    rounds: int  # how many rounds are behind us
    cycle: int  # tau
    seed: int
    shared: Factors
    merged: History = History()


@dataclass(frozen=True)
class Down:
    base: BaseUpdate
    shared: Factors


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class FedLoRU:
    """period: tau, the rounds from one merge to the next; below 1, a share of the run's rounds.
    accumulate: what a merge leaves to begin from."""

    period: float = 0.125
    accumulate: Accumulate = Accumulate.REINIT

    FACTS: ClassVar = Facts(
        title="FedLoRU",
        paper="2409.12371",
        year=2024,
        exact=False,
        mixed_ranks=False,
        personal=False,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in), and as much for every merge missed",
        server="O(K r d)",
        asks=frozenset({"base"}),
        linear=lambda method, setup, round: True,
    )

    def __post_init__(self) -> None:
        if not self.period > 0:
            raise BadInput("period must be positive")

    def init(self, setup: Setup) -> State:
        return State(0, cycle_length(self.period, setup.rounds), setup.seed, setup.fresh(one_rank(setup, self)))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        return Down(missed(state.merged, client, since), state.shared)

    def local(self, down: Down, held: None, client: Client, round: int) -> Local:
        ask = Train({SHARED: down.shared}, frozenset({(SHARED, "A"), (SHARED, "B")}), base=down.base)
        done = (yield ask).slots[SHARED]
        return Up(A=minus(done.A, down.shared.A), B=minus(done.B, down.shared.B)), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        merged, replies = noting(state.merged, replies)
        dA, dB = weighted_mean((r.client.num_examples, (r.up.A, r.up.B)) for r in replies)
        shared = replace(state.shared, A=plus(state.shared.A, dA), B=plus(state.shared.B, dB))
        if round % state.cycle == 0:
            merged = append(merged, shared)
            if self.accumulate is Accumulate.REINIT:
                shared = restart(shared, state.seed, merged.version)
        return replace(state, rounds=round, shared=shared, merged=merged), {"merges": merged.version}

    def deploy(self, state: State) -> Model:
        shared = state.shared
        if self.accumulate is Accumulate.LITERAL and state.rounds and state.rounds % state.cycle == 0:
            shared = replace(shared, scale=0.0)  # it is all in the base
        return Model({SHARED: shared}, everything(state.merged))
