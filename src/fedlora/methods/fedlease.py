"""FedLEASE (NeurIPS 2025, arXiv 2509.15087): adapters of clusters of clients as experts, and a router that picks among them.

    warm-up    each client trains an adapter of its own, without aggregation, and uploads it
    distance   d(i, j) = mean over modules of 1 - cos(vec B_i, vec B_j): of B only, for A has hardly left the common start
    clusters   once `min_clients` have warmed up: average linkage into M clusters, M the best mean silhouette of 2, ...,
               max_experts; fixed from then on
    experts    E_j = the mean of the (A, B) of cluster j, uniform over its clients

    round      all M experts go to all clients; a client of cluster j trains E_j and a router G, the other experts rest:
               y = W x + sum over chosen places i of g_i s B_e(i) A_e(i) x
               of 2M - 1 places the first M are the own expert's, then one for each other one; g = softmax(G x), the M best places
               are chosen, so between 1 and M different experts answer; chosen weights are renormalised to sum 1 (as in the code)
    server     E_j <- E_j + mean of the changes of its clients, and G_j likewise, uniform over them

With M = 1 (forced, or at most two clients) it is FedIT with uniform weights, and there is no router. Not exact: factors are
averaged apart, inside clusters only. What crosses the wire, a module: up r (d_out + d_in) + (2M - 1) d_in, down
M r (d_out + d_in) + (2M - 1) d_in; the first time up r (d_out + d_in), and nothing down, for the seed gives the start.

In the paper all clients take part in all rounds. Ours, where some do: the warm-up's share of the run's rounds (the paper: 5 of 25)
is trained inside the client's first round. The server keeps warmed-up adapters, one a client, until there are `min_clients`: by
default all clients that have data; but where a round draws few of many that is never, so by default the clusters are those of
whoever has warmed up when half of the run's rounds are over. A client that is drawn again before that goes on with its own adapter,
which the server sends back, for a round as long as any other: it counts once, by its newest adapter. Until there are clusters it
is deployed with that adapter, and who has not been here with the seed's. Who comes after the clusters are made warms up likewise,
joins the cluster whose expert its B is nearest to, and counts from its next round on.

Ours, too: clients whose adapters are all alike make one cluster. Routers start from one draw of the seed, uniform in +-1/sqrt(d_in)
as linear layers do: from zero every place would be the own expert's and no gradient would ever reach them. A client that has not
been here is deployed as one of the largest cluster. The public code differs from the text: its first round with clusters starts
from each client's own warm-up, its M is at most 4, not 8, and it corrupts the names of modules that hold a 0; here it is as in the
text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from fedlora.algebra.cluster import average_linkage, cosine_distances, purity, silhouettes
from fedlora.algebra.tensors import each, minus, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.seeds import generator
from fedlora.types import (
    GATE,
    SHARED,
    Client,
    Diagnostics,
    Factors,
    Facts,
    Local,
    Model,
    Reply,
    Router,
    Setup,
    Tensors,
    Train,
    change,
    one_rank,
)

ALIKE = 1e-12  # distances below are rounding
FEWEST = 3  # clients of which clusters are made: two would be one for ever


@dataclass(frozen=True)
class WarmedUp:
    """A client's own adapter, before there are clusters."""

    adapter: Factors
    num_examples: int


@dataclass(frozen=True)
class State:
    """`experts` is empty until there are clusters; `routers` as well while there is one expert; `waiting` from then on."""

    warmup: int  # epochs
    epochs: int  # of any other round
    fresh: Factors  # the common start
    draw: Tensors  # a router for the most experts there can be: its first rows are one for fewer
    wanted: int  # how many clients must have warmed up
    deadline: int | None  # the round after which three will do
    waiting: Mapping[int, WarmedUp] = field(default_factory=dict)  # client -> its adapter
    experts: tuple[Factors, ...] = ()
    routers: tuple[Tensors, ...] = ()
    clusters: Mapping[int, int] = field(default_factory=dict)  # client -> its own expert


@dataclass(frozen=True)
class Down:
    warmup: int = 0  # epochs; 0 once the client has a cluster
    own: int = 0
    experts: tuple[Factors, ...] = ()
    router: Tensors = field(default_factory=dict)
    adapter: Factors | None = None  # the client's own, where it has warmed up and there are no clusters yet


@dataclass(frozen=True)
class Up:
    A: Tensors = change("rank", "in")
    B: Tensors = change("out", "rank")
    G: Tensors = change("places", "in")


def slot(expert: int) -> str:
    return f"expert{expert}"


def gate(own: int, experts: int, G: Tensors, renormalise: bool) -> Router:
    """The router of a client of cluster `own`."""
    return Router(G, slot(own), tuple(slot(j) for j in range(experts) if j != own), renormalise)


@dataclass(frozen=True)
class FedLEASE:
    """
    Attributes:
        max_experts: the most clusters there may be.
        experts: the number of clusters, instead of the best silhouette's.
        warmup: its length as a share of the run's rounds, one round at least.
        min_clients: how many must have warmed up before there are clusters; by default all that have data, but whoever has (three
            at least) once half of the run's rounds are over.
        renormalise: the weights of the chosen places sum to 1.
        uniform_weights: the mean inside a cluster; otherwise by number of examples.
    """

    max_experts: int = 8
    experts: int | None = None
    warmup: float = 0.2
    min_clients: int | None = None
    renormalise: bool = True
    uniform_weights: bool = True

    FACTS: ClassVar = Facts(
        title="FedLEASE",
        paper="2509.15087",
        year=2025,
        exact=False,
        mixed_ranks=False,
        personal=True,
        upload="r (d_out + d_in) + (2M - 1) d_in, M experts",
        download="M r (d_out + d_in) + (2M - 1) d_in",
        server="O(K r d), and once O(K^2 r d_out)",
        asks=frozenset({"gate", "slots"}),
        sends=lambda method, state, client, round: frozenset("ABG" if state.routers and client.id in state.clusters else "AB"),
        dims=lambda method, setup, client: {"places": range(3, 2 * method.most)},
    )

    def __post_init__(self) -> None:
        if self.max_experts < 2 or (self.experts is not None and self.experts < 1) or not 0 <= self.warmup <= 1:
            raise BadInput("max_experts must be at least 2, experts at least 1, and warmup between 0 and 1")
        if self.min_clients is not None and self.min_clients < 1:
            raise BadInput("min_clients must be at least 1")

    @property
    def most(self) -> int:
        return self.max_experts if self.experts is None else max(2, self.experts)

    def init(self, setup: Setup) -> State:
        fresh = setup.fresh(one_rank(setup, self))
        draw = {
            m: torch.tensor(
                generator(setup.seed, "fedlease", "router", m).uniform(-(d**-0.5), d**-0.5, (2 * self.most - 1, d)),
                dtype=fresh.A[m].dtype,
            )
            for m, (_, d) in setup.shapes.items()
        }
        able = sum(client.num_examples > 0 for client in setup.clients)  # who has no data never takes part
        wanted, deadline = (able, setup.rounds // 2) if self.min_clients is None else (min(self.min_clients, able), None)
        return State(max(1, round(self.warmup * setup.rounds)) * setup.epochs, setup.epochs, fresh, draw, wanted, deadline)

    def hold(self, setup: Setup, client: Client) -> Factors:
        return setup.fresh(one_rank(setup, self))

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        if client.id in state.waiting:
            return Down(state.epochs, adapter=state.waiting[client.id].adapter)
        if client.id not in state.clusters:
            return Down(state.warmup)
        own = state.clusters[client.id]
        return Down(0, own, state.experts, state.routers[own] if state.routers else {})

    def local(self, down: Down, held: Factors | None, client: Client, round: int) -> Local:
        if down.warmup:
            start = down.adapter or held
            assert start is not None, "a client that the server does not know has not been here"
            done = yield Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}), epochs=down.warmup)
            own = done.slots[SHARED]
            return Up(minus(own.A, start.A), minus(own.B, start.B)), None  # the start has served: the rest comes from the server
        name, slots = slot(down.own), {slot(j): expert for j, expert in enumerate(down.experts)}
        roles = {(name, "A"), (name, "B")}
        if not down.router:
            done = (yield Train(slots, frozenset(roles))).slots[name]
            return Up(minus(done.A, slots[name].A), minus(done.B, slots[name].B)), None
        router = gate(down.own, len(slots), down.router, self.renormalise)
        answer = yield Train(slots, frozenset({*roles, (GATE, "G")}), gate=router)
        done = answer.slots[name]
        return Up(minus(done.A, slots[name].A), minus(done.B, slots[name].B), minus(answer.gate.G, router.G)), None

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        came = list(replies)
        old = [r for r in came if r.client.id in state.clusters]
        new = [r for r in came if r.client.id not in state.clusters]
        diagnostics: Diagnostics = {}
        experts, routers = list(state.experts), list(state.routers)
        for j in sorted({state.clusters[r.client.id] for r in old}):
            mine = [r for r in old if state.clusters[r.client.id] == j]
            if routers:  # no check knows how many experts there are: a reply with another router does not count
                mine = [r for r in mine if {m: G.shape for m, G in r.up.G.items()} == {m: G.shape for m, G in routers[j].items()}]
            if not mine:
                continue
            A, B, G = weighted_mean((self._weight(r.client.num_examples), (r.up.A, r.up.B, r.up.G)) for r in mine)
            experts[j] = replace(experts[j], A=plus(experts[j].A, A), B=plus(experts[j].B, B))
            if routers:
                routers[j] = plus(routers[j], G)
        state = replace(state, experts=tuple(experts), routers=tuple(routers))
        if state.experts:
            state = replace(state, clusters={**state.clusters, **{r.client.id: nearest(state, r.up.B) for r in new}})
        else:
            state = replace(state, waiting={**state.waiting, **{r.client.id: warmed_up(state, r) for r in new}})
            late = state.deadline is not None and round >= state.deadline
            if len(state.waiting) >= (min(FEWEST, state.wanted) if late else state.wanted):
                state, diagnostics = self._found(state)
        clusters = {str(client): j for client, j in sorted(state.clusters.items())}
        return state, {"clusters": clusters, "waiting": len(state.waiting), **diagnostics, **_purity(state, came)}

    def _found(self, state: State) -> tuple[State, Diagnostics]:
        """The clusters of all that have warmed up, in the order of their ids."""
        warm = dict(sorted(state.waiting.items()))
        distances = cosine_distances([own.adapter.B for own in warm.values()])
        scores: dict[int, float] = {}
        if self.experts is not None:
            count = min(self.experts, len(warm))
        else:
            scores = silhouettes(distances, self.max_experts) if distances.max() > ALIKE else {}
            count = max(scores, key=lambda m: scores[m], default=1)
        labels = average_linkage(distances, count)
        experts = []
        for j in range(count):
            mine = [own for own, label in zip(warm.values(), labels, strict=True) if label == j]
            A, B = weighted_mean((self._weight(own.num_examples), (own.adapter.A, own.adapter.B)) for own in mine)
            experts.append(replace(state.fresh, A=A, B=B))
        router = each(lambda G: G[: 2 * count - 1], state.draw)
        clusters = {id: int(label) for id, label in zip(warm, labels, strict=True)}
        routers = (router,) * count if count > 1 else ()
        return replace(state, experts=tuple(experts), routers=routers, clusters=clusters, waiting={}), {
            "experts": count,
            "silhouettes": {str(m): score for m, score in scores.items()},
            "distances": torch.from_numpy(distances),
        }

    def _weight(self, num_examples: int) -> float:
        return 1.0 if self.uniform_weights else num_examples

    def deploy(self, state: State) -> Model:
        if not state.experts:
            return Model({SHARED: state.fresh})
        everyone = list(state.clusters.values())
        largest = max(range(len(state.experts)), key=everyone.count)
        return self._mixture(state.experts, largest, state.routers[largest] if state.routers else {})

    def own(self, down: Down, held: Factors | None, client: Client) -> Model:
        if not down.experts:
            start = down.adapter or held
            assert start is not None, "a client that the server does not know has not been here"
            return Model({SHARED: start})
        return self._mixture(down.experts, down.own, down.router)

    def _mixture(self, experts: tuple[Factors, ...], own: int, router: Tensors) -> Model:
        slots = {slot(j): expert for j, expert in enumerate(experts)}
        return Model(slots, gate=gate(own, len(slots), router, self.renormalise) if router else None)


def warmed_up(state: State, reply: Reply) -> WarmedUp:
    """A client's adapter with what its reply says that it changed."""
    id = reply.client.id
    start = state.waiting[id].adapter if id in state.waiting else state.fresh
    return WarmedUp(replace(start, A=plus(start.A, reply.up.A), B=plus(start.B, reply.up.B)), reply.client.num_examples)


def nearest(state: State, B: Tensors) -> int:
    """The expert whose B is the most alike."""
    return int(np.argmin(cosine_distances([B, *(expert.B for expert in state.experts)])[0, 1:]))


def _purity(state: State, replies: list[Reply]) -> Diagnostics:
    """Of the clusters against the domain of which each client has most examples, where there are several domains."""
    placed = [r.client for r in replies if r.client.domains and r.client.id in state.clusters]
    known = [(state.clusters[client.id], max(client.domains, key=lambda t: client.domains[t])) for client in placed]
    return {"purity": purity([j for j, _ in known], [task for _, task in known])} if known else {}
