"""A method of your own in forty lines: federated averaging of A and B with momentum on the server (FedAvgM, 1909.06335).

python examples/own_method.py
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import fedlora
from fedlora.algebra.tensors import each, minus, plus, weighted_mean
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank


@dataclass(frozen=True)
class State:
    shared: Factors
    A: Tensors  # the velocity of each factor
    B: Tensors


@dataclass(frozen=True)
class Up:  # what a client sends: what training changed, so that clipping, noise and compression can act on it
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class Momentum:
    momentum: float = 0.5

    FACTS: ClassVar = Facts(
        title="LoRA with FedAvgM",
        paper="1909.06335",
        year=2019,
        exact=False,
        mixed_ranks=False,
        personal=False,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in)",
        server="O(K r d)",
    )

    def init(self, setup: Setup) -> State:
        start = setup.fresh(one_rank(setup, self))
        return State(start, minus(start.A, start.A), minus(start.B, start.B))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Factors:
        return state.shared

    def local(self, down: Factors, held: None, client: Client, round: int) -> Local:
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(minus(done.A, down.A), minus(done.B, down.B)), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        A, B = weighted_mean((reply.client.num_examples, (reply.up.A, reply.up.B)) for reply in replies)
        A, B = plus(self._slower(state.A), A), plus(self._slower(state.B), B)
        return State(Factors(plus(state.shared.A, A), plus(state.shared.B, B), state.shared.scale), A, B), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})

    def _slower(self, velocity: Tensors) -> Tensors:
        return each(lambda x: self.momentum * x, velocity)


if __name__ == "__main__":
    from own_data import tickets

    teams = ["billing", "delivery", "account"]
    data = fedlora.Data(tickets(1, 100, teams), tickets(2, 40, teams))
    for momentum in (0.0, 0.5):
        run = fedlora.run(data=data, method=Momentum(momentum), rank=4, clients=5, alpha=0.5, rounds=3, progress=False)
        print(f"momentum {momentum}: {run}")
