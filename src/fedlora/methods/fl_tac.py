"""FL-TAC (Ping et al., ICLR 2024 workshop, arXiv 2404.15384): an adapter a task, found again at the server by clustering.

A client has one adapter (A, B) for each of its tasks and trains it on that task's examples only. It uploads all of them without
saying which is which, and the server, in a run of T tasks,

    clusters   all adapters, each flattened to one vector, by K-means into T clusters (10 starts)
    averages   inside each cluster:  A <- sum_i w_i A_i,  B <- sum_i w_i B_i,  w_i proportional to its number of examples
    returns    to every owner the mean of the cluster that its adapter fell in

With T = 1 it is FedIT. Not exact: factors are averaged apart, and inside clusters only. With no more adapters than clusters each is
its own; an empty cluster keeps its mean. What crosses the wire: r (d_out + d_in) a module for each of the client's tasks, both
ways; uploads as changes, to which the server adds what it had sent.

Ours where the paper is silent: K-means sees distances only, computed from one Gram matrix; a round's clusters go on as those of the
round before that they lie nearest to (the pairing with the least total squared distance), so that an owner who sits out a round
still belongs somewhere; who is new starts from the mean of all clusters. Algorithm 3 of the paper averages without weights, its
code with the number of samples: a field. Evaluation gives every client its own adapters, wrong clusters included: the public code
takes any holder's adapter for a task, which hides them. Diagnostics say where each adapter went; they use the true tasks, which the
algorithm never sees.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from fedlora.algebra.cluster import adjusted_rand, coordinates, kmeans, matched, purity
from fedlora.algebra.tensors import each, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.seeds import derive
from fedlora.types import (
    SHARED,
    ByTask,
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
class State:
    seed: int
    round: int  # how many are behind us
    means: tuple[Factors, ...]  # of each cluster
    clusters: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # client -> the cluster of each of its adapters


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
    return client.tasks or {"": client.num_examples}


def content(adapter: Adapter) -> tuple[float, ...]:
    """Sorts adapters by what they are and not by whose."""
    return tuple(float(x.double().sum()) for part in (adapter.B, adapter.A) for x in part.values())


@dataclass(frozen=True)
class FLTAC:
    """tries: starts of K-means. uniform_weights: the mean of Algorithm 3, otherwise by number of examples."""

    tries: int = 10
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
        dims=lambda method, setup, client: {"adapters": len(tasks_of(client))},
    )

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise BadInput("tries must be at least 1")

    def init(self, setup: Setup) -> State:
        tasks = {task for client in setup.clients for task in client.tasks}
        return State(setup.seed, 0, (setup.fresh(one_rank(setup, self)),) * max(1, len(tasks)))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client) -> Down:
        if client.id in state.clusters:
            return Down(tuple(state.means[j] for j in state.clusters[client.id]))
        return Down((_common(state),) * len(tasks_of(client)))

    def local(self, down: Down, held: None, client: Client) -> Local:
        done = []
        for task, start in zip(tasks_of(client), down.adapters, strict=True):
            trained = yield Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}), data=task)
            done.append(trained.slots[SHARED])
        pairs = list(zip(done, down.adapters, strict=True))
        A = {m: torch.stack([f.A[m] - start.A[m] for f, start in pairs]) for m in down.adapters[0].A}
        B = {m: torch.stack([f.B[m] - start.B[m] for f, start in pairs]) for m in down.adapters[0].B}
        return Up(A, B), held

    def aggregate(self, state: State, replies: Iterator[Reply]) -> tuple[State, Diagnostics]:
        adapters = sorted((a for reply in replies for a in self._adapters(state, reply)), key=content)
        # The old means are in the picture too, to see which of them each new cluster continues.
        places = coordinates([_flat(a.A, a.B) for a in adapters] + [_flat(f.A, f.B) for f in state.means])
        new, old = places[: len(adapters)], places[len(adapters) :]
        labels = kmeans(new, len(state.means), derive(state.seed, "k-means", state.round + 1), self.tries)
        means, clusters = list(state.means), dict(state.clusters)
        inside = [[i for i, label in enumerate(labels) if label == j] for j in range(labels.max() + 1)]
        centres = [np.average(new[rows], axis=0, weights=[adapters[i].weight for i in rows]) for rows in inside]
        found: dict[int, dict[int, int]] = {}
        for rows, j in zip(inside, matched(np.stack(centres), old), strict=True):
            A, B = weighted_mean((a.weight, (a.A, a.B)) for a in (adapters[i] for i in rows))
            means[j] = replace(means[j], A=A, B=B)
            for i in rows:
                found.setdefault(adapters[i].owner, {})[adapters[i].place] = j
        clusters |= {owner: tuple(places[i] for i in range(len(places))) for owner, places in sorted(found.items())}
        truth = {(a.owner, a.place): a.task for a in adapters}
        where = [found[owner][place] for owner, place in truth]
        diagnostics: Diagnostics = {"clusters": {str(owner): list(clusters[owner]) for owner in sorted(found)}}
        if len(state.means) > 1:
            tasks = list(truth.values())
            diagnostics = {**diagnostics, "purity": purity(where, tasks), "adjusted_rand": adjusted_rand(where, tasks)}
        return State(state.seed, state.round + 1, tuple(means), clusters), diagnostics

    def _adapters(self, state: State, reply: Reply) -> Iterator[Adapter]:
        starts = self.send(state, reply.client).adapters
        for i, ((task, count), start) in enumerate(zip(tasks_of(reply.client).items(), starts, strict=True)):
            A, B = (plus(f, each(lambda x, i=i: x[i], up)) for f, up in ((start.A, reply.up.A), (start.B, reply.up.B)))
            yield Adapter(A, B, 1.0 if self.uniform_weights else count, reply.client.id, i, task)

    def deploy(self, state: State, client: Client | None = None, held: None = None) -> Model:
        if client is None or client.id not in state.clusters:
            return Model({SHARED: _common(state)})
        own = [state.means[j] for j in state.clusters[client.id]]
        if len(own) == 1:
            return Model({SHARED: own[0]})
        slots = {f"task{i}": mean for i, mean in enumerate(own)}
        return Model(slots, gate=ByTask(dict(zip(client.tasks, slots, strict=True))))


def _common(state: State) -> Factors:
    """The mean of all clusters: where who is new begins."""
    A, B = weighted_mean((1.0, (f.A, f.B)) for f in state.means)
    return replace(state.means[0], A=A, B=B)


def _flat(A: Tensors, B: Tensors) -> Tensors:
    """Both factors as the modules of one mapping."""
    return {f"{m}.A": x for m, x in A.items()} | {f"{m}.B": x for m, x in B.items()}
