"""RBLA (Tavallaie et al. 2024, arXiv 2408.08699): a mean of factors in which a rank counts for those alone who have it.

    client k:  trains the first r_k ranks of the shared adapter, A_k (r_k, d_in) and B_k (d_out, r_k)
    server:    A[j] <- sum_k w_k A_k[j] / sum_k w_k,   B[:, j] alike,   over the participants with r_k > j,   w_k = n_k
               a rank that no participant has stays as it was

Where HetLoRA fills small adapters up with zeros, which shrinks the ranks that few clients have, no rank is diluted here. Not exact:
factors are averaged apart; with equal ranks it is FedIT. What crosses the wire: r_k (d_out + d_in) a module, both ways; uploads as
changes, which have the same mean, since all owners of a rank start from it.

Ours: one scale, alpha / r_max, for everybody, for with alpha / r_k a client's ranks would be another function at the server. The
public code marks what a client lacks by NaN, so that it takes a diverged client for one of rank 0, and leaves NaN where nobody has
a rank; here ranks are known, and numbers that are not finite are refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.algebra.tensors import minus, owners_mean, plus
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class RBLA:
    FACTS: ClassVar = Facts(
        title="RBLA",
        paper="2408.08699",
        year=2024,
        exact=False,
        mixed_ranks=True,
        personal=False,
        upload="r_k (d_out + d_in)",
        download="r_k (d_out + d_in)",
        server="O(K r d)",
        linear=lambda method, setup, round: True,
        holders=True,
    )

    def init(self, setup: Setup) -> Factors:
        return setup.fresh(setup.all_ranks[-1])

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: Factors, client: Client, round: int, since: int | None = None) -> Factors:
        return state.first(client.rank)

    def local(self, down: Factors, held: None, client: Client, round: int) -> Local:
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(minus(done.A, down.A), minus(done.B, down.B)), held

    def aggregate(self, state: Factors, replies: Iterator[Reply], round: int) -> tuple[Factors, Diagnostics]:
        A, B = owners_mean(((r.client.num_examples, (r.up.A, r.up.B)) for r in replies), (state.A, state.B))
        return replace(state, A=plus(state.A, A), B=plus(state.B, B)), {}

    def deploy(self, state: Factors) -> Model:
        return Model({SHARED: state})
