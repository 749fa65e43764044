"""SLoRA (Babakniya et al. 2023, arXiv 2308.06522): a sparse start in the weights themselves, then FedIT from what it found.

    stage 1   rounds 1 to R_1: federated fine-tuning of the target modules' weights, of which only a share `density` of the entries,
              drawn at random once and the same for all clients, may move:  W <- W + sum_k w_k dW_k
    switch    dW = W - W_0 = U S V';  B = U_r S_r / s,  A = V_r';  the weights go back to W_0
    stage 2   B <- B + sum_k w_k dB_k,  A <- A + sum_k w_k dA_k                  w_k = n_k / sum of n over the participants

Exact in stage 1, since the mean of the weights is the mean of the updates; then as inexact as FedIT. At the switch s B A is the
best approximation of dW at rank r. What crosses the wire: in stage 1 the free entries, density d_out d_in a module, both ways
(nothing down in round 1), without their places, which the seed gives; in stage 2 both factors, r (d_out + d_in), both ways.

Ours where the paper is silent: R_1 is a share of the run's rounds, at least one and not the last; every module has the same share
of free entries, at least one; where dW has less than r ranks the rest of A is completed to orthonormal rows and B is zero there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora import seeds
from fedlora.algebra.lowrank import complete_rows, leading, pad_rank
from fedlora.algebra.sparse import spread
from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.types import (
    BASE,
    FULL,
    SHARED,
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
class Drawn:
    """Where the free entries are: what the seed says, and not they themselves."""

    seed: int
    density: float
    shapes: Mapping[str, tuple[int, ...]]  # module -> shape of its weight
    transposed: tuple[str, ...]  # modules whose weight is stored (d_in, d_out)


@dataclass(frozen=True)
class State:
    sparse_rounds: int  # R_1
    drawn: Drawn
    shared: Factors  # the adapter; as it starts until the switch
    rounds: int = 0  # how many are behind us
    W: Tensors = field(default_factory=dict)  # module -> change of its free entries; empty before round 2 and after the switch


@dataclass(frozen=True)
class Down:
    sparse: bool  # whether this is a round of stage 1
    W: Tensors = field(default_factory=dict)
    shared: Factors | None = None


@dataclass(frozen=True)
class Up:
    W: Tensors = change("free")  # stage 1
    A: Tensors = change("rank", "in")  # stage 2
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class SLoRA:
    """
    Attributes:
        density: share of a weight's entries that stage 1 may move.
        sparse_share: share of the run's rounds that stage 1 takes.
    """

    density: float = 0.01
    sparse_share: float = 0.1

    FACTS: ClassVar = Facts(
        title="SLoRA",
        paper="2308.06522",
        year=2023,
        exact=False,
        mixed_ranks=False,
        personal=False,
        upload="density d_out d_in (stage 1), then r (d_out + d_in)",
        download="density d_out d_in (stage 1), then r (d_out + d_in)",
        server="O(K (density d_out d_in + r d)), and one SVD of d_out x d_in",
        asks=frozenset({"full", "mask"}),
        linear=lambda method, setup, round: True,
        sends=lambda method, state, client, round: frozenset("W" if round <= state.sparse_rounds else "AB"),
        dims=lambda method, setup, client: {"free": {m: _count(method.density, o * i) for m, (o, i) in setup.shapes.items()}},
    )

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or not 0 <= self.sparse_share <= 1:
            raise BadInput("density lies in (0, 1] and sparse_share in [0, 1]")

    def init(self, setup: Setup) -> State:
        sparse_rounds = min(max(1, round(self.sparse_share * setup.rounds)), setup.rounds - 1) if self.sparse_share else 0
        return State(sparse_rounds, self._drawn(setup), setup.fresh(one_rank(setup, self)))

    def hold(self, setup: Setup, client: Client) -> Drawn:
        return self._drawn(setup)

    def _drawn(self, setup: Setup) -> Drawn:
        for m in setup.shapes:
            if f"{m}.weight" not in setup.params:
                raise BadInput(f"{self.FACTS.title} trains the weights of the target modules, but {m} has none that can train")
        shapes = {m: tuple(setup.params[f"{m}.weight"]) for m in setup.shapes}
        return Drawn(setup.seed, self.density, shapes, tuple(sorted(setup.transposed)))

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        if round <= state.sparse_rounds:
            return Down(True, W=state.W)
        return Down(False, shared=state.shared)

    def local(self, down: Down, held: Drawn, client: Client, round: int) -> Local:
        if down.shared is not None:
            done = (yield Train({SHARED: down.shared}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
            return Up(A=minus(done.A, down.shared.A), B=minus(done.B, down.shared.B)), held
        masks = _masks(held)
        may = {f"{m}.weight": mask for m, mask in masks.items()}
        full = (yield Train({}, FULL, mask={(BASE, "W"): may}, full=_dense(down.W, masks))).full
        now = {m: full[f"{m}.weight"][mask] for m, mask in masks.items()}
        return Up(W=minus(now, down.W) if down.W else now), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        if round > state.sparse_rounds:
            A, B = weighted_mean((r.client.num_examples, (r.up.A, r.up.B)) for r in replies)
            shared = replace(state.shared, A=plus(state.shared.A, A), B=plus(state.shared.B, B))
            return replace(state, rounds=round, shared=shared), {}
        (moved,) = weighted_mean((r.client.num_examples, (r.up.W,)) for r in replies)
        W = plus(state.W, moved) if state.W else moved
        if round < state.sparse_rounds:
            return replace(state, rounds=round, W=W), {}
        return replace(state, rounds=round, W={}, shared=_factorise(W, state.drawn, state.shared)), {}

    def deploy(self, state: State) -> Model:
        if state.rounds < state.sparse_rounds:
            return Model(full=_dense(state.W, _masks(state.drawn)) if state.W else {})
        return Model({SHARED: state.shared})


def _count(density: float, entries: int) -> int:
    """How many entries of a weight are free."""
    return max(1, round(density * entries))


def _masks(drawn: Drawn) -> dict[str, Tensor]:
    """Module -> which entries of its weight are free, of the weight's own shape."""
    masks = {}
    for m, shape in drawn.shapes.items():
        flat = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
        rng = seeds.generator(drawn.seed, "free entries", m)
        flat[torch.from_numpy(rng.choice(len(flat), _count(drawn.density, len(flat)), replace=False, shuffle=False))] = True
        masks[m] = flat.view(shape)
    return masks


def _dense(W: Tensors, masks: Tensors) -> dict[str, Tensor]:
    """Parameter -> its whole change."""
    return {f"{m}.weight": spread(x, masks[m]) for m, x in W.items()}


def _factorise(W: Tensors, drawn: Drawn, like: Factors) -> Factors:
    """The best adapter of the rank and scale of `like`."""
    masks, A, B = _masks(drawn), {}, {}
    for m, x in W.items():
        rank = like.A[m].shape[0]
        dense = spread(x, masks[m])
        dense = dense.mT if m in drawn.transposed else dense
        scaled, Vt = leading(dense, rank)
        B[m], A[m] = pad_rank(scaled / like.scale, Vt, rank)[0], complete_rows(Vt, rank)
    return Factors(A, B, like.scale)
