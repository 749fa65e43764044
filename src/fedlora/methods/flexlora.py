"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): average the products, then decompose for every client's rank.

    W_g = sum_k w_k s_k B_k A_k = U S V',   w_k = n_k / sum of n over the participants,  s_k = alpha / r_k
    client k receives  B = U[:, :r_k] S[:r_k] / s_k,   A = V[:, :r_k]'

Exact up to the truncation: ||W_g - s_k B A||_F^2 is the sum of the squared singular values past r_k. The SVD works on the stacked
factors, (d_out, R) and (R, d_in) with R = sum_k r_k, by an (R, R) core: O(d R^2 + R^3); W_g itself is formed where that is cheaper
(see `factored_pays`), and once R is above d_out or d_in, so that memory does not grow with the clients. Where W_g has fewer ranks
than a client, the rest of B is zero and the rest of A orthonormal, so that they can still learn. What crosses the wire: r_k (d_out
+ d_in) a module, both ways.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fedlora.algebra.lowrank import at_rank
from fedlora.algebra.products import mean_of_products
from fedlora.algebra.tensors import each
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, value


@dataclass(frozen=True)
class State:
    shared: Factors  # at the largest rank and scale 1: B = U S, A = V'
    scale: dict[int, float]  # rank -> s


@dataclass(frozen=True)
class Up:
    A: Tensors = value("rank", "in")
    B: Tensors = value("out", "rank")


@dataclass(frozen=True)
class FlexLoRA:
    FACTS: ClassVar = Facts(
        title="FlexLoRA",
        paper="2402.11505",
        year=2024,
        exact=True,
        mixed_ranks=True,
        personal=False,
        upload="r_k (d_out + d_in)",
        download="r_k (d_out + d_in)",
        server="O(d R^2 + R^3), R = sum r_k",
    )

    def init(self, setup: Setup) -> State:
        fresh = setup.fresh(setup.all_ranks[-1])
        return State(Factors(fresh.A, fresh.B, 1.0), {r: setup.scaling(r) for r in setup.all_ranks})

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Factors:
        r, s = client.rank, state.scale[client.rank]
        return Factors(each(lambda A: A[:r], state.shared.A), each(lambda B: B[:, :r] / s, state.shared.B), s)

    def local(self, down: Factors, held: None, client: Client, round: int) -> Local:
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        terms = ((r.client.num_examples, state.scale[r.client.rank], r.up.B, r.up.A) for r in replies)
        mean, A, B = mean_of_products(terms), {}, {}
        for m, before in state.shared.A.items():
            B[m], A[m] = at_rank(mean[m], len(before))
        return State(Factors(A, B, 1.0), state.scale), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})
