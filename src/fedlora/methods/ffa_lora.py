"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A is frozen for ever at one random draw; only B trains.

    B <- sum_k w_k B_k,   A = A_0 on every client, from the seed

Exact, since sum_k w_k B_k A_0 = (sum_k w_k B_k) A_0. What crosses the wire: B, r d_out a module, both ways; uploads as changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank


@dataclass(frozen=True)
class Up:
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class FFALoRA:
    FACTS: ClassVar = Facts(
        title="FFA-LoRA",
        paper="2403.12313",
        year=2024,
        exact=True,
        mixed_ranks=False,
        personal=False,
        upload="r d_out",
        download="r d_out",
        server="O(K r d_out)",
        linear=lambda method, setup, round: True,
    )

    def init(self, setup: Setup) -> Factors:
        return setup.fresh(one_rank(setup, self))

    def hold(self, setup: Setup, client: Client) -> Tensors:
        return setup.fresh(client.rank).A

    def send(self, state: Factors, client: Client, round: int, since: int | None = None) -> Factors:
        return replace(state, A={})

    def local(self, down: Factors, held: Tensors, client: Client, round: int) -> Local:
        done = (yield Train({SHARED: replace(down, A=held)}, frozenset({(SHARED, "B")}))).slots[SHARED]
        return Up(B=minus(done.B, down.B)), held

    def aggregate(self, state: Factors, replies: Iterator[Reply], round: int) -> tuple[Factors, Diagnostics]:
        (B,) = weighted_mean((r.client.num_examples, (r.up.B,)) for r in replies)
        return replace(state, B=plus(state.B, B)), {}

    def deploy(self, state: Factors) -> Model:
        return Model({SHARED: state})
