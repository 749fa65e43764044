"""FL-TAC (Ping et al., ICLR 2024 workshop, arXiv 2404.15384): an adapter a task, found again at the server by clustering.

A client has one adapter (A, B) for each of its tasks and trains it on that task's examples only. It uploads all of them without
saying which is which, and the server, in a run of T tasks,

    clusters   the round's adapters, each flattened to one vector, by K-means into T clusters (10 starts)
    averages   inside each cluster:  A <- sum_i w_i A_i,  B <- sum_i w_i B_i,  w_i proportional to its number of examples
    returns    to every owner the mean of the cluster that its adapter fell in

An owner keeps the mean that was last returned to it, as in the public code, until it takes part again: clusters are a round's own.
A round that lacks a task has fewer tasks than clusters, so others are split, and no cluster of it goes on as one that there was
before. With T = 1 it is FedIT: there is one cluster at any time, and everybody has its mean. Not exact: factors are averaged apart,
and inside clusters only. With no more adapters than clusters each is its own. What crosses the wire: r (d_out + d_in) a module for
each of the client's tasks, both ways; uploads as changes, to which the server adds what it had sent. The server keeps every mean
that some owner holds, once.

Ours where the paper, in which all clients take part in all rounds, is silent: who has taken part more often lies farther from the
start, and distances then tell old from new and not task from task; so K-means sees the directions in which adapters lie from the
seed's adapter (a field; the paper clusters the vectors), by one Gram matrix. Who is new starts from the seed's adapter, for a mean
of clusters would hold other tasks. The model without a client is the mean of what all owners hold. Algorithm 3 of the paper
averages without weights, its code with the number of samples: a field. Evaluation gives every client its own adapters, wrong
clusters included: the public code takes any holder's adapter for a task, which hides them.

Diagnostics are of what all owners hold after the round, and use the true tasks, which the algorithm never sees. `purity` is the
share of a mean that was averaged from adapters of its owner's task, in the mean over all owners' adapters; `mixed` the share of
these whose mean has another task in it; `adjusted_rand` compares who holds one mean with who has one task: 1 where each task has
one mean, less where its owners took part last in different rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedlora.algebra.cluster import adjusted_rand, coordinates, directions, kmeans
from fedlora.algebra.tensors import each, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.seeds import derive
from fedlora.types import (
    SHARED,
    ByDomain,
    Client,
    Diagnostics,
    Factors,
    Facts,
    Local,
    Model,
    Reply,
    Setup,
    Tensors,
    Train,
    change,
    one_rank,
)


@dataclass(frozen=True)
class Mean:
    """The mean of a round's cluster, and what share of it was averaged from adapters of each task: the truth, for diagnostics."""

    adapter: Factors
    tasks: Mapping[str, float]


@dataclass(frozen=True)
class State:
    """`clusters` says which of the means was last returned to each adapter of a client."""

    seed: int
    count: int  # T, the number of tasks and of a round's clusters
    start: Factors  # of who is new; with one task everybody's
    owned: Mapping[int, tuple[str, ...]]  # client -> its tasks, for diagnostics only
    means: tuple[Mean, ...] = ()  # those that some owner holds
    clusters: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Down:
    adapters: tuple[Factors, ...]  # in the client's own order of its tasks


@dataclass(frozen=True)
class Up:
    A: Tensors = change("adapters", "rank", "in")
    B: Tensors = change("adapters", "out", "rank")


@dataclass(frozen=True)
class Adapter:
    """One adapter at the server, its weight, and where it came from."""

    A: Tensors
    B: Tensors
    weight: float
    owner: int
    place: int  # among the owner's
    task: str  # the truth, for diagnostics only


def tasks_of(client: Client) -> Mapping[str, int]:
    """Task -> number of examples; the task "" in a run of one."""
    return client.domains or {"": client.num_examples}


def content(adapter: Adapter) -> tuple[float, ...]:
    """Sorts adapters by what they are and not by whose."""
    return tuple(float(x.double().sum()) for part in (adapter.B, adapter.A) for x in part.values())


@dataclass(frozen=True)
class FLTAC:
    """
    Attributes:
        tries: starts of K-means.
        by_direction: K-means sees where adapters lie from the seed's one, and not how far; otherwise their distances.
        uniform_weights: the mean of Algorithm 3, otherwise by number of examples.
    """

    tries: int = 10
    by_direction: bool = True
    uniform_weights: bool = False

    FACTS: ClassVar = Facts(
        title="FL-TAC",
        paper="2404.15384",
        year=2024,
        exact=False,
        mixed_ranks=False,
        personal=True,
        upload="r (d_out + d_in) for each task of the client",
        download="r (d_out + d_in) for each task of the client",
        server="O(n^2 r d), n adapters",
        asks=frozenset({"domains"}),
        dims=lambda method, setup, client: {"adapters": len(tasks_of(client))},
    )

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise BadInput("tries must be at least 1")

    def init(self, setup: Setup) -> State:
        tasks = {task for client in setup.clients for task in client.domains}
        owned = {client.id: tuple(tasks_of(client)) for client in setup.clients}
        return State(setup.seed, max(1, len(tasks)), setup.fresh(one_rank(setup, self)), owned)

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        if client.id in state.clusters:
            return Down(tuple(state.means[j].adapter for j in state.clusters[client.id]))
        return Down((state.start,) * len(tasks_of(client)))

    def local(self, down: Down, held: None, client: Client, round: int) -> Local:
        done = []
        for task, start in zip(tasks_of(client), down.adapters, strict=True):
            trained = yield Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}), data=task)
            done.append(trained.slots[SHARED])
        pairs = list(zip(done, down.adapters, strict=True))
        A = {m: torch.stack([f.A[m] - start.A[m] for f, start in pairs]) for m in down.adapters[0].A}
        B = {m: torch.stack([f.B[m] - start.B[m] for f, start in pairs]) for m in down.adapters[0].B}
        return Up(A, B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        adapters = sorted((a for reply in replies for a in self._adapters(state, reply, round)), key=content)
        if state.count == 1:
            return replace(state, start=_mean(state.start, adapters).adapter), {}
        labels = self._labels(state, adapters, round)
        made = [_mean(state.start, [a for a, x in zip(adapters, labels, strict=True) if x == j]) for j in range(max(labels) + 1)]
        found: dict[int, dict[int, int]] = {}
        for a, label in zip(adapters, labels, strict=True):
            found.setdefault(a.owner, {})[a.place] = len(state.means) + label
        clusters = {**state.clusters, **{owner: tuple(own[i] for i in range(len(own))) for owner, own in found.items()}}
        kept = list(dict.fromkeys(j for _, own in sorted(clusters.items()) for j in own))
        after = replace(
            state,
            means=tuple([*state.means, *made][j] for j in kept),
            clusters={owner: tuple(kept.index(j) for j in own) for owner, own in sorted(clusters.items())},
        )
        return after, _diagnostics(after)

    def _labels(self, state: State, adapters: Sequence[Adapter], round: int) -> list[int]:
        """The cluster of each adapter."""
        places = coordinates([*(_flat(a.A, a.B) for a in adapters), _flat(state.start.A, state.start.B)])
        points = directions(places[:-1], places[-1]) if self.by_direction else places[:-1]
        return list(map(int, kmeans(points, state.count, derive(state.seed, "k-means", round), self.tries)))

    def _adapters(self, state: State, reply: Reply, round: int) -> Iterator[Adapter]:
        starts = self.send(state, reply.client, round).adapters
        for i, ((task, count), start) in enumerate(zip(tasks_of(reply.client).items(), starts, strict=True)):
            A, B = (plus(f, each(lambda x, i=i: x[i], up)) for f, up in ((start.A, reply.up.A), (start.B, reply.up.B)))
            yield Adapter(A, B, 1.0 if self.uniform_weights else count, reply.client.id, i, task)

    def deploy(self, state: State) -> Model:
        return Model({SHARED: _average(state) if state.means else state.start})

    def own(self, down: Down, held: None, client: Client) -> Model:
        if len(down.adapters) == 1:
            return Model({SHARED: down.adapters[0]})
        slots = {f"task{i}": mean for i, mean in enumerate(down.adapters)}
        return Model(slots, gate=ByDomain(dict(zip(client.domains, slots, strict=True))))


def _mean(like: Factors, cluster: Sequence[Adapter]) -> Mean:
    """The weighted mean of a cluster's adapters."""
    A, B = weighted_mean((a.weight, (a.A, a.B)) for a in cluster)
    of = {task: sum(a.weight for a in cluster if a.task == task) for task in sorted({a.task for a in cluster})}
    return Mean(replace(like, A=A, B=B), {task: weight / sum(of.values()) for task, weight in of.items()})


def _average(state: State) -> Factors:
    """The mean of all that owners hold."""
    held = [state.means[j].adapter for own in state.clusters.values() for j in own]
    A, B = weighted_mean((1.0, (f.A, f.B)) for f in held)
    return replace(state.start, A=A, B=B)


def _diagnostics(state: State) -> Diagnostics:
    """Where every adapter is, and how right that is."""
    held = [(j, task) for owner, own in state.clusters.items() for j, task in zip(own, state.owned[owner], strict=True)]
    shares = [state.means[j].tasks.get(task, 0.0) for j, task in held]
    return {
        "clusters": {str(owner): list(own) for owner, own in state.clusters.items()},
        "purity": sum(shares) / len(held),
        "mixed": sum(share < 1.0 for share in shares) / len(held),
        "adjusted_rand": adjusted_rand([j for j, _ in held], [task for _, task in held]),
    }


def _flat(A: Tensors, B: Tensors) -> Tensors:
    """Both factors as the modules of one mapping."""
    return {f"{m}.A": x for m, x in A.items()} | {f"{m}.B": x for m, x in B.items()}
