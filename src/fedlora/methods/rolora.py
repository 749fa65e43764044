"""RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755): odd rounds train B, even rounds train A; the other factor rests.

    odd round:   B <- B + mean_k (B_k - B),   A unchanged        even round: the reverse

Exact in every round: the resting factor is common to all, so the mean of the products is the product of the means. What crosses
the wire: the factor that trains, up; the factor that changed last, down, to a client that took part in the last round, both
factors to a client that missed it, none in round 1 (the seed gives them). The paper's mean is uniform over clients.
Ours: B goes first, since A has no gradient while B is zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedlora.algebra.alternate import roles_changed, trained_role
from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank


@dataclass(frozen=True)
class State:
    shared: Factors
    seen: Mapping[int, int] = field(default_factory=dict)  # client -> rounds behind the factors it holds; absent is 0


@dataclass(frozen=True)
class Down:
    new: Factors  # what changed since the client was last here


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class RoLoRA:
    """uniform_weights: every client counts the same (the paper); otherwise by its number of examples."""

    uniform_weights: bool = True

    FACTS: ClassVar = Facts(
        title="RoLoRA",
        paper="2502.01755",
        year=2025,
        exact=True,
        mixed_ranks=False,
        personal=False,
        upload="r d_out in odd rounds, r d_in in even ones",
        download="the factor that changed last",
        server="O(K r d)",
        linear=lambda method, setup, round: True,
        weight=lambda method, client: 1.0 if method.uniform_weights else client.num_examples,
        sends=lambda method, state, client, round: frozenset({trained_role(round)}),
    )

    def init(self, setup: Setup) -> State:
        return State(setup.fresh(one_rank(setup, self)))

    def hold(self, setup: Setup, client: Client) -> Factors:
        return setup.fresh(client.rank)

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        changed = roles_changed(state.seen.get(client.id, 0) if since is None else 0, round - 1)
        shared = state.shared
        return Down(replace(shared, A=shared.A if "A" in changed else {}, B=shared.B if "B" in changed else {}))

    def local(self, down: Down, held: Factors, client: Client, round: int) -> Local:
        start = Factors(down.new.A or held.A, down.new.B or held.B, held.scale)
        role = trained_role(round)
        done = (yield Train({SHARED: start}, frozenset({(SHARED, role)}))).slots[SHARED]
        return Up(B=minus(done.B, start.B)) if role == "B" else Up(A=minus(done.A, start.A)), start

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        seen = dict(state.seen)

        def term(reply: Reply) -> tuple[float, tuple[Tensors, Tensors]]:
            seen[reply.client.id] = round - 1
            return 1.0 if self.uniform_weights else reply.client.num_examples, (reply.up.A, reply.up.B)

        A, B = weighted_mean(map(term, replies))
        shared = state.shared
        moved = replace(shared, A=plus(shared.A, A) if A else shared.A, B=plus(shared.B, B) if B else shared.B)
        return State(moved, seen), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})
