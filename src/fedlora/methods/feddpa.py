"""FedDPA (Yang et al., NeurIPS 2024, arXiv 2403.19211): a global and a local adapter, weighed for each input.

    y = W x + (1 - a) s B_g A_g x + a s B_l A_l x

Client k, in each round of

    FedDPA-T   trains the global adapter alone, in full, and uploads what that changed; then, from the second round on, its local
               adapter beside the global one that it received, at a = `mix`
    FedDPA-F   while the global adapter is learned (`federated` of all rounds): trains it as in FedIT; then trains its local adapter
               beside the final global one, at a = `mix`, and sends nothing

    server:    B_g <- mean_k B_k,   A_g <- mean_k A_k,   uniform over the participants as in the public code
    inference: a = cap * the mean cosine of the input's features to those of S of the client's own examples

Models are personal: neither the local adapter nor the S features ever travel. Not exact: factors are averaged apart. The global
adapter is FedIT's with uniform weights. What crosses the wire: the global factors, r (d_out + d_in) a module, both ways; uploads as
changes.

As the public code has it, a is not cut off below: an input that points away from the examples (which hidden states of transformers
hardly do) has the local adapter's output subtracted. That code's features are the last token's, with the local adapter active; the
mean over the tokens of the pre-trained model is ours: it does not change from round to round, and encoders have it, too. Ours where
the paper is silent: both adapters start from the same A; a client draws its S examples in its first round; one whose local adapter
has not trained yet, and the model without a client, use the global adapter alone, in full; the share of rounds of FedDPA-F.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain
from typing import ClassVar

from torch import Tensor

from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.types import (
    SHARED,
    Client,
    Diagnostics,
    Factors,
    Facts,
    Features,
    Local,
    Mix,
    Model,
    Nothing,
    Observe,
    Reply,
    Setup,
    Similarity,
    Tensors,
    Train,
    change,
    one_rank,
)

LOCAL = "local"
GLOBAL_ROLES = frozenset({(SHARED, "A"), (SHARED, "B")})
LOCAL_ROLES = frozenset({(LOCAL, "A"), (LOCAL, "B")})


class Variant(Enum):
    """When the local adapter trains."""

    TOGETHER = "t"  # in every round from the second on, after the global one
    AFTER = "f"  # once the global one is learned


@dataclass(frozen=True)
class State:
    shared: Factors  # the global adapter
    federated: int = 0  # how many rounds teach the global adapter


@dataclass(frozen=True)
class Down:
    shared: Factors
    global_trains: bool
    local_trains: bool


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class Held:
    local: Factors
    anchors: Tensor  # (S, d); empty before the first round


@dataclass(frozen=True)
class FedDPA:
    """
    Attributes:
        variant: t trains the local adapter in each round, f once the global one is learned.
        mix: a, the local adapter's weight, while it trains.
        cap: a at inference for an input that is just like the client's own examples.
        anchors: S, how many own examples an input is compared with.
        federated: the share of the rounds that teach the global adapter in variant f.
        uniform_weights: the server's mean counts every client the same; otherwise n_k.
    """

    variant: Variant = Variant.TOGETHER
    mix: float = 0.5
    cap: float = 0.5
    anchors: int = 5
    federated: float = 0.5
    uniform_weights: bool = True

    FACTS: ClassVar = Facts(
        title="FedDPA",
        paper="2403.19211",
        year=2024,
        exact=False,
        mixed_ranks=False,
        personal=True,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in)",
        server="O(K r d)",
        asks=frozenset({"gate", "slots"}),
        linear=lambda method, setup, round: True,
        weight=lambda method, client: 1.0 if method.uniform_weights else client.num_examples,
        sends=lambda method, state, client, round: frozenset("AB" if method._learns(state, round) else ""),
        silent=True,
    )

    def __post_init__(self) -> None:
        if not (0 <= self.mix <= 1 and 0 <= self.cap <= 1 and 0 < self.federated <= 1 and self.anchors >= 1):
            raise BadInput("mix and cap must lie in [0, 1], federated in (0, 1], and anchors must be at least 1")

    def init(self, setup: Setup) -> State:
        share = self.federated if self.variant is Variant.AFTER else 1.0
        return State(setup.fresh(one_rank(setup, self)), federated=math.ceil(share * setup.rounds))

    def hold(self, setup: Setup, client: Client) -> Held:
        start = setup.fresh(client.rank)
        return Held(start, next(iter(start.A.values())).new_zeros(0, 0))

    def _learns(self, state: State, round: int) -> bool:
        """Whether this round teaches the global adapter."""
        return self.variant is Variant.TOGETHER or round <= state.federated

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        if self.variant is Variant.TOGETHER:
            return Down(state.shared, global_trains=True, local_trains=round > 1)
        learning = self._learns(state, round)
        return Down(state.shared, global_trains=learning, local_trains=not learning)

    def local(self, down: Down, held: Held, client: Client, round: int) -> Local:
        if not held.anchors.numel():
            seen = yield Observe(Features(self.anchors))
            held = replace(held, anchors=seen.tensors["features"])
        up: Up | Nothing = Nothing()
        if down.global_trains:
            done = (yield Train({SHARED: down.shared}, GLOBAL_ROLES)).slots[SHARED]
            up = Up(A=minus(done.A, down.shared.A), B=minus(done.B, down.shared.B))
        if down.local_trains:
            beside, gate = {SHARED: down.shared, LOCAL: held.local}, Mix({SHARED: 1.0 - self.mix, LOCAL: self.mix})
            held = replace(held, local=(yield Train(beside, LOCAL_ROLES, gate=gate)).slots[LOCAL])
        return up, held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        learning = self._learns(state, round)
        heard = (r for r in replies if learning and isinstance(r.up, Up))  # each is forgotten when the next one comes
        first = next(heard, None)
        if first is None:
            return state, {}
        told = chain([first], heard)
        A, B = weighted_mean((1 if self.uniform_weights else r.client.num_examples, (r.up.A, r.up.B)) for r in told)
        return replace(state, shared=replace(state.shared, A=plus(state.shared.A, A), B=plus(state.shared.B, B))), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})

    def own(self, down: Down, held: Held, client: Client) -> Model:
        slots = {SHARED: down.shared, LOCAL: held.local}
        if not any(bool(B.any()) for B in held.local.B.values()):
            # It changes nothing yet, and must not take the global one's share.
            return Model(slots, gate=Mix({LOCAL: 0.0}))
        return Model(slots, gate=Similarity(LOCAL, held.anchors, self.cap))
