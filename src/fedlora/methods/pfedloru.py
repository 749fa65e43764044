"""pFedLoRU (Park and Klabjan 2024, arXiv 2409.12371): FedLoRU with a personal adapter beside the shared one on every client.

    client k:  W + s B A + s L_k U_k;  trains (L_k, U_k) with (A, B) fixed, then (A, B) with (L_k, U_k) fixed
    server:    A <- A + sum_k w_k dA_k,   B <- B + sum_k w_k dB_k,   w_k = n_k / sum of n over the participants
    every tau rounds:  W <- W + s B A  on everybody; A is drawn anew, B is zero

Not exact: the factors are averaged apart. Clients end with different models. What crosses the wire: up, the changes of the shared
factors, r (d_out + d_in) a module; down, both of them, and the (A, B) of every merge that the client missed, r (d_out + d_in) each,
or the dense sum of all where that is smaller. L_k and U_k never leave their client.

Ours: the personal adapter has the rank and the scale of the shared one, L_k = 0 and U_k from the seed by client at the start; it
trains for the run's local epochs or `personal_epochs`, the shared one for the run's; a merge leaves it as it is. tau is an eighth
of the run, as in FedLoRU's public code, which has no pFedLoRU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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

PERSONAL = "personal"


@dataclass(frozen=True)
class State:
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
class PFedLoRU:
    """period: tau, the rounds from one merge to the next; below 1, a share of the run's rounds.
    personal_epochs: local epochs of the personal adapter; none given, the run's."""

    period: float = 0.125
    personal_epochs: int | None = None

    FACTS: ClassVar = Facts(
        title="pFedLoRU",
        paper="2409.12371",
        year=2024,
        exact=False,
        mixed_ranks=False,
        personal=True,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in), and as much for every merge missed",
        server="O(K r d)",
        asks=frozenset({"base", "slots"}),
        linear=lambda method, setup, round: True,
    )

    def __post_init__(self) -> None:
        if not self.period > 0:
            raise BadInput("period must be positive")
        if self.personal_epochs is not None and self.personal_epochs < 1:
            raise BadInput("personal_epochs must be at least 1")

    def init(self, setup: Setup) -> State:
        return State(cycle_length(self.period, setup.rounds), setup.seed, setup.fresh(one_rank(setup, self)))

    def hold(self, setup: Setup, client: Client) -> Factors:
        return restart(setup.fresh(client.rank), setup.seed, "personal", client.id)

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        return Down(missed(state.merged, client, since), state.shared)

    def local(self, down: Down, held: Factors, client: Client, round: int) -> Local:
        ask = Train({SHARED: down.shared, PERSONAL: held}, frozenset(), base=down.base)
        own = (yield replace(ask, roles=frozenset({(PERSONAL, "A"), (PERSONAL, "B")}), epochs=self.personal_epochs)).slots
        done = (yield replace(ask, slots=own, roles=frozenset({(SHARED, "A"), (SHARED, "B")}))).slots
        up = Up(A=minus(done[SHARED].A, down.shared.A), B=minus(done[SHARED].B, down.shared.B))
        return up, done[PERSONAL]

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        merged, replies = noting(state.merged, replies)
        dA, dB = weighted_mean((r.client.num_examples, (r.up.A, r.up.B)) for r in replies)
        shared = replace(state.shared, A=plus(state.shared.A, dA), B=plus(state.shared.B, dB))
        if round % state.cycle == 0:
            merged = append(merged, shared)
            shared = restart(shared, state.seed, merged.version)
        return replace(state, shared=shared, merged=merged), {"merges": merged.version}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared}, everything(state.merged))

    def own(self, down: Down, held: Factors, client: Client) -> Model:
        return Model({SHARED: down.shared, PERSONAL: held}, down.base)
