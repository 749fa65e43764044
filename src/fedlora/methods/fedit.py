"""FedIT, also called FL+LoRA (Zhang et al. 2023, arXiv 2305.05644): federated averaging of the two factors, each on its own.

    B <- sum_k w_k B_k,   A <- sum_k w_k A_k,   w_k = n_k / sum of n over the participants

Not exact: sum_k w_k B_k A_k - B A = sum_k w_k (B_k - B)(A_k - A), which vanishes only when the factors do not vary together over
the clients. What crosses the wire: both factors, r (d_out + d_in) a module, both ways; uploads as changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class FedIT:
    FACTS: ClassVar = Facts(
        title="FedIT (FL+LoRA)",
        paper="2305.05644",
        year=2023,
        exact=False,
        mixed_ranks=False,
        personal=False,
        upload="r (d_out + d_in)",
        download="r (d_out + d_in)",
        server="O(K r d)",
        linear=lambda method, setup, round: True,
    )

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
        A, B = weighted_mean((r.client.num_examples, (r.up.A, r.up.B)) for r in replies)
        return replace(state, A=plus(state.A, A), B=plus(state.B, B)), {}

    def deploy(self, state: Factors) -> Model:
        return Model({SHARED: state})
