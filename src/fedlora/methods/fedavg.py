"""FedAvg with full fine-tuning (McMahan et al. 2017, arXiv 1602.05629): the reference that LoRA is measured against.

    theta_k  = theta after the local epochs of client k
    theta   <- theta + sum_k w_k (theta_k - theta),   w_k = n_k / sum of n over the participants

Exact: the mean of the weights is the mean of the updates. What crosses the wire: every parameter of the model but the head, both
ways; in round 1 nothing comes down, since everybody has the pre-trained model. State and messages hold the change from the
pre-trained parameters, so that a transform can act on uploads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.types import FULL, Client, Diagnostics, Facts, Local, Model, Reply, Setup, Tensors, Train, change


@dataclass(frozen=True)
class State:
    full: Tensors = field(default_factory=dict)  # parameter -> change from the pre-trained value; empty is no change yet


@dataclass(frozen=True)
class Up:
    full: Tensors = change("*")  # parameter -> change of this round


@dataclass(frozen=True)
class FedAvg:
    FACTS: ClassVar = Facts(
        title="FedAvg (full fine-tuning)",
        paper="1602.05629",
        year=2016,
        exact=True,
        mixed_ranks=True,
        personal=False,
        upload="all parameters",
        download="all parameters",
        server="O(K d_out d_in)",
        asks=frozenset({"full"}),
        linear=lambda method, setup, round: True,
    )

    def init(self, setup: Setup) -> State:
        return State()

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> State:
        return state

    def local(self, down: State, held: None, client: Client, round: int) -> Local:
        done = yield Train({}, FULL, full=down.full)
        return Up(minus(done.full, down.full) if down.full else done.full), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        (mean,) = weighted_mean((r.client.num_examples, (r.up.full,)) for r in replies)
        return State(plus(state.full, mean) if state.full else mean), {}

    def deploy(self, state: State) -> Model:
        return Model(full=state.full)
