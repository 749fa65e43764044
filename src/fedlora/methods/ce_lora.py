"""CE-LoRA (Li et al. 2025, arXiv 2503.23869): three factors, of which the small one in the middle travels.

    W + s B_i C_i A_i,   C_i (r, r)

Client i trains all three and uploads C_i alone. It keeps A_i and B_i, and gets back its own mean of all clients' C_j,

    C_i <- sum_j w_ij C_j,   w_ij proportional to S_ij,   sum_j w_ij = 1

over every client j that ever took part, by its last upload, and i itself. Who sits out a round keeps what it was given last.
where S_ij says how alike clients i and j are: by their data, D_ij = 1 - d_ij / max d with the optimal transport distance d of their
classes' mixtures of Gaussians, and by their models, M_ij = CKA(C_i, C_j), mean over modules (both in `algebra.similarity`).

Models are personal, so "exact" has no meaning; the model without a client is A_0 and the uniform mean of all C_j, and changes
nothing, for B_0 = 0. What crosses the wire: C, r^2 a module, both ways; uploads as changes; and, in a client's first round, its
mixtures: of c classes with k parts of d features each, c k (2 d + 1) numbers and the c shares of the classes. The server keeps each
client's last C_j and mixtures; each pair of data sets is compared once.

The server's code is not public and the paper leaves open how the two similarities combine: a field, by default their sum. The
classes' mixtures are as the public client's code has them, of the features of [CLS], the first token, in the last hidden state of
the pre-trained model; of a model that has none, such as a decoder, of the mean over the tokens, which is ours. Ours, too: A_0 is
LoRA's and common to all, since C_j of unlike bases have no mean (the code draws A with deviation 1e-3); the uniform mean for a
client never seen; a client without a class of two examples is as far from all as the farthest; a row without any similarity is
uniform. Diagnostics: `mixing`, the w of the round, with a row for each of `mixing_clients` and a column for each of `mixing_known`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlora.algebra.similarity import MOST_PARTS, cka, closeness, dataset_distance
from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.types import (
    SHARED,
    ClassMixtures,
    Client,
    Diagnostics,
    Factors,
    Facts,
    Local,
    Model,
    Observe,
    Reply,
    Setup,
    Tensors,
    Train,
    change,
    one_rank,
    statistic,
)


class Combination(Enum):
    """S, from the similarities of data and models."""

    SUM = "sum"
    PRODUCT = "product"
    DATA = "data"
    MODEL = "model"


@dataclass(frozen=True)
class State:
    """Clients that were ever here are known: their last C, what they were given back, their mixtures."""

    shared: Factors  # A_0, B_0 = 0, and the uniform mean of C for whom the server does not know
    own: Mapping[int, Tensors] = field(default_factory=dict)  # client -> its last C_j
    means: Mapping[int, Tensors] = field(default_factory=dict)  # client -> what it is sent
    mixtures: Mapping[int, Tensors] = field(default_factory=dict)
    distances: Mapping[tuple[int, int], float] = field(default_factory=dict)  # of two data sets, the smaller id first


@dataclass(frozen=True)
class Down:
    C: Tensors
    wants_mixtures: bool


@dataclass(frozen=True)
class Up:
    C: Tensors = change("rank", "rank")
    mixtures: Tensors = statistic(
        shares=("class",),
        weights=("class", "part"),
        means=("class", "part", "feature"),
        variances=("class", "part", "feature"),
    )


@dataclass(frozen=True)
class CELoRA:
    """
    Attributes:
        combination: sum, product, data or model.
        components: of a class's mixture, at most 3.
    """

    combination: Combination = Combination.SUM
    components: int = 3

    FACTS: ClassVar = Facts(
        title="CE-LoRA",
        paper="2503.23869",
        year=2025,
        exact=False,
        mixed_ranks=False,
        personal=True,
        upload="r²; once also the mixtures, c k (2 d_feature + 1) + c in all",
        download="r²",
        server="O(K r³ + K² r²), and once O(K²) transports",
        asks=frozenset({"C", "classes"}),
        sends=lambda method, state, client, round: frozenset({"C", "mixtures"} if method._wants_mixtures(state, client) else "C"),
        dims=lambda method, setup, client: {"part": method.components},
    )

    def __post_init__(self) -> None:
        if not 1 <= self.components <= MOST_PARTS:
            raise BadInput(f"components must lie in 1 to {MOST_PARTS}")

    def init(self, setup: Setup) -> State:
        rank = one_rank(setup, self)
        start = setup.fresh(rank)
        return State(start.with_role("C", {m: torch.eye(rank, dtype=A.dtype) for m, A in start.A.items()}))

    def hold(self, setup: Setup, client: Client) -> Factors:
        return setup.fresh(client.rank)

    def _wants_mixtures(self, state: State, client: Client) -> bool:
        return self.combination is not Combination.MODEL and client.id not in state.mixtures

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        return Down(self._sent(state, client.id), self._wants_mixtures(state, client))

    def _sent(self, state: State, id: int) -> Tensors:
        return state.means.get(id, state.shared.C)

    def local(self, down: Down, held: Factors, client: Client, round: int) -> Local:
        mixtures: Tensors = {}
        if down.wants_mixtures:
            seen = (yield Observe(ClassMixtures(self.components), pool="first")).tensors
            counts = seen["counts"].to(seen["means"].dtype)
            mixtures = {"shares": counts / counts.sum()} | {name: seen[name] for name in ("weights", "means", "variances")}
        start = held.with_role("C", down.C)
        done = (yield Train({SHARED: start}, frozenset((SHARED, role) for role in "ABC"))).slots[SHARED]
        return Up(minus(done.C, down.C), mixtures), done.with_role("C", {})

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        own, mixtures, here = dict(state.own), dict(state.mixtures), []
        for reply in replies:
            id = reply.client.id
            here.append(id)
            own[id] = plus(self._sent(state, id), reply.up.C)
            if reply.up.mixtures and id not in mixtures:
                mixtures[id] = reply.up.mixtures
        known, distances = sorted(own), dict(state.distances)
        if self.combination is not Combination.MODEL:
            for i in known:
                for j in known:
                    if i < j and (i, j) not in distances and i in mixtures and j in mixtures:
                        distances[i, j] = dataset_distance(mixtures[i], mixtures[j])
        weights = self._weights(own, known, here, distances)
        given = {
            i: weighted_mean((w, (own[j],)) for w, j in zip(row, known, strict=True))[0]
            for i, row in zip(here, weights.tolist(), strict=True)
        }
        (mean,) = weighted_mean((1.0, (own[j],)) for j in known)
        diagnostics = {"mixing": weights, "mixing_clients": torch.tensor(here), "mixing_known": torch.tensor(known)}
        return State(state.shared.with_role("C", mean), own, {**state.means, **given}, mixtures, distances), diagnostics

    def _weights(
        self, own: Mapping[int, Tensors], known: list[int], here: list[int], distances: Mapping[tuple[int, int], float]
    ) -> Tensor:
        """w, one row for every participant and one column for every known client."""
        M = cka([own[i] for i in here], [own[j] for j in known]).numpy()
        d = np.zeros((len(known), len(known)))
        for a, i in enumerate(known):
            for b, j in enumerate(known[:a]):
                d[a, b] = d[b, a] = distances.get((j, i), np.nan)
        D = closeness(d)[[known.index(i) for i in here]]
        S = {
            Combination.SUM: D + M,
            Combination.PRODUCT: D * M,
            Combination.DATA: D,
            Combination.MODEL: M,
        }[self.combination]
        S = np.where(S.sum(axis=1, keepdims=True) > 0, S, 1.0)
        return torch.from_numpy(S / S.sum(axis=1, keepdims=True))

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})

    def own(self, down: Down, held: Factors, client: Client) -> Model:
        return Model({SHARED: held.with_role("C", down.C)})
