"""Fed-SB (Singhal et al., TMLR 2026, arXiv 2502.15436): fix B and A after a first estimate, and train an r x r core between them.

    round 1:  clients train an ordinary adapter;  sum_k w_k s B_k A_k = U S V',  w_k = n_k / sum of n over the participants
              B = U[:, :r],  A = V[:, :r]',  R = S[:r] / s:  the first update is kept as far as rank r holds it
    later:    clients train R alone in W + s B R A;   R <- R + sum_k w_k dR_k

Exact: from round 2 on B and A are common to all, so that the mean of the products is the product of the mean; round 1 cuts the mean
of the products, an SVD of stacked factors, to rank r. What crosses the wire: up, r (d_out + d_in) a module in round 1 (changes of
both factors; the seed gives where they start, so nothing comes down), then r^2; down, r^2, and once B and A, r (d_out + d_in), in
the first round after round 1 that a client takes part in.

Ours: the paper estimates the first update from a few gradients of a small sample; here it is what clients learn in round 1, in
`first_steps` steps, or the run's local epochs where none are given.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.algebra.lowrank import complete_rows, factored_svd, leading
from fedlora.algebra.products import mean_of_products
from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank


@dataclass(frozen=True)
class State:
    shared: Factors  # C is R; absent before round 1, when A and B are an ordinary start
    know: tuple[int, ...] = ()  # the clients that hold the fixed B and A


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")  # round 1
    B: Tensors = change("out", "rank")  # round 1
    C: Tensors = change("rank", "rank")  # later


@dataclass(frozen=True)
class FedSB:
    """first_steps: optimiser steps of a client in round 1; none given, the run's local epochs."""

    first_steps: int | None = None

    FACTS: ClassVar = Facts(
        title="Fed-SB",
        paper="2502.15436",
        year=2025,
        exact=True,
        mixed_ranks=False,
        personal=False,
        upload="r^2; r (d_out + d_in) in round 1",
        download="r^2; r (d_out + d_in) once",
        server="O(K r^2); O(d R^2 + R^3) in round 1, R = K r",
        asks=frozenset({"C"}),
        linear=lambda method, setup, round: round > 1,
        sends=lambda method, state, client, round: frozenset("C" if round > 1 else "AB"),
    )

    def __post_init__(self) -> None:
        if self.first_steps is not None and self.first_steps < 1:
            raise BadInput("first_steps must be at least 1")

    def init(self, setup: Setup) -> State:
        return State(setup.fresh(one_rank(setup, self)))

    def hold(self, setup: Setup, client: Client) -> Factors:
        return setup.fresh(client.rank)

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Factors:
        if round > 1 and (since is not None or client.id not in state.know):
            return state.shared
        return replace(state.shared, A={}, B={})

    def local(self, down: Factors, held: Factors, client: Client, round: int) -> Local:
        start = replace(down, A=down.A or held.A, B=down.B or held.B)
        if not start.C:
            ask = Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}), max_steps=self.first_steps)
            done = (yield ask).slots[SHARED]
            return Up(A=minus(done.A, start.A), B=minus(done.B, start.B)), held
        done = (yield Train({SHARED: start}, frozenset({(SHARED, "C")}))).slots[SHARED]
        return Up(C=minus(done.C, start.C)), replace(start, C={})

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        if round == 1:
            return State(fixed(state.shared, replies)), {}
        know = set(state.know)

        def term(reply: Reply) -> tuple[float, tuple[Tensors]]:
            know.add(reply.client.id)
            return reply.client.num_examples, (reply.up.C,)

        (dC,) = weighted_mean(map(term, replies))
        shared = replace(state.shared, C=plus(state.shared.C, dC))
        return State(shared, tuple(sorted(know))), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})


def fixed(start: Factors, replies: Iterator[Reply]) -> Factors:
    """U[:, :r], diag(S[:r]) / s and V[:, :r]' of the mean of the products. Past the smaller side of a module there are no more
    directions: what is left is zero."""
    terms = ((r.client.num_examples, 1.0, plus(start.B, r.up.B), plus(start.A, r.up.A)) for r in replies)
    A, B, C = {}, {}, {}
    for m, mean in mean_of_products(terms).items():
        rank = len(start.A[m])
        U, S, Vt = factored_svd(*leading(mean, rank))
        B[m], A[m] = complete_rows(U.mT, rank).mT.contiguous(), complete_rows(Vt, rank)
        C[m] = torch.nn.functional.pad(S, (0, rank - len(S))).diag()  # the scale s is outside of it
    return replace(start, A=A, B=B, C=C)
