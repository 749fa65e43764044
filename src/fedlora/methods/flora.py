"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stack the factors of all clients and merge the stack into the base.

    client k:  draws A_k afresh, B_k = 0, at its own rank r_k, and trains both on W
    server:    B_st = [w_1 s_1 B_1 ... w_K s_K B_K],  A_st = [A_1; ...; A_K],  w_k = n_k / sum of n,  s_k = alpha / r_k
    everybody: W <- W + B_st A_st

Exact for any ranks: B_st A_st = sum_k w_k s_k B_k A_k. What crosses the wire: up, A_k and B_k, r_k (d_out + d_in) a module; down,
the stack of every round that a client missed, (d_out + d_in) sum_j r_j each; once the stack is wider than min(d_out, d_in) it is
formed, which needs no more numbers, and many stacks become one dense sum where that is smaller. A_k is drawn from the seed by
client and round, so it never comes down.

Ours: the paper's text puts the weights on A; on B it is the same product. Clients draw different A_k, as the public code does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora import seeds
from fedlora.algebra.products import mean_of_products
from fedlora.algebra.tensors import each
from fedlora.history import History, append_matrices, everything, missed, noting
from fedlora.types import (
    SHARED,
    BaseUpdate,
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
    value,
)


@dataclass(frozen=True)
class State:
    scale: Mapping[int, float]  # rank -> s
    merged: History = History()


@dataclass(frozen=True)
class Down:
    base: BaseUpdate


@dataclass(frozen=True)
class Held:
    seed: int  # the client's own
    empty: Factors  # at rank 0: sizes, dtype and scale of what the client draws


@dataclass(frozen=True)
class Up:
    A: Tensors = value("rank", "in")
    B: Tensors = change("out", "rank")  # from zero


def draw(held: Held, rank: int, round: int) -> Factors:
    """The client's start in a round: A uniform in +-1/sqrt(d_in) as at any LoRA's start, B zero."""

    def uniform(m: str) -> torch.Tensor:
        like = held.empty.A[m]
        bound = like.shape[1] ** -0.5
        numbers = seeds.generator(held.seed, "fresh", round, m).uniform(-bound, bound, (rank, like.shape[1]))
        return torch.from_numpy(numbers).to(like.dtype)

    return replace(held.empty, A={m: uniform(m) for m in held.empty.A}, B=each(lambda B: B.new_zeros(len(B), rank), held.empty.B))


@dataclass(frozen=True)
class FLoRA:
    FACTS: ClassVar = Facts(
        title="FLoRA",
        paper="2409.05976",
        year=2024,
        exact=True,
        mixed_ranks=True,
        personal=False,
        upload="r_k (d_out + d_in)",
        download="(d_out + d_in) sum_j r_j for every round missed",
        server="O(R d), or O(d_out d_in R) once R = sum r_k is above min(d_out, d_in)",
        asks=frozenset({"base"}),
    )

    def init(self, setup: Setup) -> State:
        return State({r: setup.scaling(r) for r in setup.all_ranks})

    def hold(self, setup: Setup, client: Client) -> Held:
        fresh = setup.fresh(client.rank)
        return Held(
            seeds.derive(setup.seed, "flora", client.id),
            replace(fresh, A=each(lambda A: A[:0].clone(), fresh.A), B=each(lambda B: B[:, :0].clone(), fresh.B)),
        )

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        return Down(missed(state.merged, client, since))

    def local(self, down: Down, held: Held, client: Client, round: int) -> Local:
        start = draw(held, client.rank, round)
        ask = Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}), base=down.base)
        done = (yield ask).slots[SHARED]
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        merged, replies = noting(state.merged, replies)
        means = mean_of_products((r.client.num_examples, state.scale[r.client.rank], r.up.B, r.up.A) for r in replies)
        return State(state.scale, append_matrices(merged, means)), {}

    def deploy(self, state: State) -> Model:
        return Model(base=everything(state.merged))
