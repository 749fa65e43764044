"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): A is shared, B stays on its client.

    client k:  trains A and B_k from (A, its own B_k), uploads A_k - A
    server:    A <- sum_k w_k A_k,   w_k = n_k / sum of n over the participants

With model.rslora this is the paper's FedSA-rsLoRA. Its FedSA-VeRA trains two vectors of a module around frozen random factors,

    W + diag(b_k) B diag(d) A,   A and B from the seed, d (r,) shared, b_k (d_out,) the client's own

with d = 0.1 and b_k = 0 at the start and scale 1, as VeRA has them (Kopiczko et al. 2024, arXiv 2310.11454).

Models are personal: no client's B_k or b_k ever travels, and "exact" has no meaning. The model without a client is the shared part,
which changes nothing by itself. What crosses the wire: r d_in a module (VeRA: r), both ways; uploads as changes. A client that has
never taken part has B_k = 0. The paper keeps the head local too: model.head = "personal".
Ours where VeRA leaves it open: B is uniform in +-1/sqrt(r), A as LoRA's, each module its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from fedlora import seeds
from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank

FIRST_D = 0.1  # VeRA's start of d


class Variant(Enum):
    """What is shared, and what is a client's own."""

    LORA = "lora"  # A and B
    VERA = "vera"  # d and b


SHARES = {Variant.LORA: "A", Variant.VERA: "C"}
KEEPS = {Variant.LORA: "B", Variant.VERA: "D"}


@dataclass(frozen=True)
class Up:
    A: Tensors = change("lora", "in")
    C: Tensors = change("vera")  # d


@dataclass(frozen=True)
class FedSALoRA:
    """variant: LoRA's factors, or VeRA's vectors."""

    variant: Variant = Variant.LORA

    FACTS: ClassVar = Facts(
        title="FedSA-LoRA",
        paper="2410.01463",
        year=2024,
        exact=False,
        mixed_ranks=False,
        personal=True,
        upload="r d_in; with VeRA r",
        download="r d_in; with VeRA r",
        server="O(K r d)",
        asks=frozenset({"C", "D"}),
        spares=lambda method: frozenset("CD") if method.variant is Variant.LORA else frozenset(),
        linear=lambda method, setup, round: True,
        sends=lambda method, state, client, round: frozenset(SHARES[method.variant]),
        dims=lambda method, setup, client: {v.value: client.rank if v is method.variant else range(0) for v in Variant},
    )

    def init(self, setup: Setup) -> Factors:
        return self._start(setup, one_rank(setup, self))

    def hold(self, setup: Setup, client: Client) -> Factors:
        """Everything but the shared role, which comes with every order."""
        return self._start(setup, client.rank).with_role(SHARES[self.variant], {})

    def _start(self, setup: Setup, rank: int) -> Factors:
        start = setup.fresh(rank)
        if self.variant is Variant.LORA:
            return start
        half = rank**-0.5
        B = {m: seeds.generator(setup.seed, "vera", m).uniform(-half, half, tuple(x.shape)) for m, x in start.B.items()}
        return Factors(
            A=start.A,
            B={m: torch.from_numpy(x).to(start.B[m].dtype) for m, x in B.items()},
            scale=1.0,
            C={m: torch.full((rank,), FIRST_D, dtype=A.dtype) for m, A in start.A.items()},
            D={m: torch.zeros(len(x), dtype=x.dtype) for m, x in start.B.items()},
        )

    def send(self, state: Factors, client: Client, round: int, since: int | None = None) -> Tensors:
        return state.role(SHARES[self.variant])

    def local(self, down: Tensors, held: Factors, client: Client, round: int) -> Local:
        shares, keeps = SHARES[self.variant], KEEPS[self.variant]
        start = held.with_role(shares, down)
        done = (yield Train({SHARED: start}, frozenset({(SHARED, shares), (SHARED, keeps)}))).slots[SHARED]
        moved = minus(done.role(shares), down)
        return Up(A=moved) if shares == "A" else Up(C=moved), held.with_role(keeps, done.role(keeps))

    def aggregate(self, state: Factors, replies: Iterator[Reply], round: int) -> tuple[Factors, Diagnostics]:
        shares = SHARES[self.variant]
        (moved,) = weighted_mean((r.client.num_examples, (r.up.A if shares == "A" else r.up.C,)) for r in replies)
        return state.with_role(shares, plus(state.role(shares), moved)), {}

    def deploy(self, state: Factors) -> Model:
        return Model({SHARED: state})

    def own(self, down: Tensors, held: Factors, client: Client) -> Model:
        return Model({SHARED: held.with_role(SHARES[self.variant], down)})
