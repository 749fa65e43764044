"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): average the products, then decompose for every client's rank.

    W_g = sum_k w_k s_k B_k A_k = U S V',   w_k = n_k / sum of n over the participants,  s_k = alpha / r_k
    client k receives  B = U[:, :r_k] S[:r_k] / s_k,   A = V[:, :r_k]'

Exact up to the truncation: ||W_g - s_k B A||_F^2 is the sum of the squared singular values past r_k. The SVD works on the stacked
factors, (d_out, R) and (R, d_in) with R = sum_k r_k, by QR and an (R, R) core: O(d R^2 + R^3), never d_out x d_in unless R is no
smaller. Where W_g has fewer ranks than a client, the rest of B is zero and the rest of A orthonormal, so that they can still
learn. What crosses the wire: r_k (d_out + d_in) a module, both ways.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.algebra.lowrank import complete_rows, factored_svd, pad_rank
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
        fresh = setup.fresh(max(setup.ranks.values()))
        return State(Factors(fresh.A, fresh.B, 1.0), {r: setup.scaling(r) for r in setup.ranks.values()})

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client) -> Factors:
        r, s = client.rank, state.scale[client.rank]
        return Factors(each(lambda A: A[:r], state.shared.A), each(lambda B: B[:, :r] / s, state.shared.B), s)

    def local(self, down: Factors, held: None, client: Client) -> Local:
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply]) -> tuple[State, Diagnostics]:
        got = list(replies)
        total = sum(r.client.num_examples for r in got)
        weights = [state.scale[r.client.rank] * r.client.num_examples / total for r in got]
        A, B = {}, {}
        for m, before in state.shared.A.items():
            rank = before.shape[0]
            U, S, Vt = factored_svd(
                torch.cat([w * r.up.B[m] for w, r in zip(weights, got, strict=True)], dim=1), torch.cat([r.up.A[m] for r in got])
            )
            B[m] = pad_rank((U * S)[:, :rank], Vt[:rank], rank)[0]
            A[m] = complete_rows(Vt[:rank], rank)
        return State(Factors(A, B, 1.0), state.scale), {}

    def deploy(self, state: State, client: Client | None = None, held: None = None) -> Model:
        return Model({SHARED: state.shared})
