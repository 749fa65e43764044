"""What every method claims, one row or more each, written from the papers: `test_laws.py` holds every method to its rows.

A formula counts parameters of one client in one round. `up` is what it uploaded and `last` the round in which it took part before
(0: never).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np

from fedlora.methods import make
from fedlora.types import BASE, SHARED, Client, Reply, Role, Setup

BOTH = frozenset({"A", "B"})


def n_k(replies: Sequence[Reply]) -> list[float]:
    return [r.client.num_examples for r in replies]


def uniform(replies: Sequence[Reply]) -> list[float]:
    return [1.0 for _ in replies]


def product_norms(replies: Sequence[Reply]) -> list[float]:
    """HetLoRA: ||B_k A_k||_F over the whole model, from the dense products."""
    products = [[r.up.B[m].double().numpy() @ r.up.A[m].double().numpy() for m in r.up.A] for r in replies]
    return [float(np.sqrt(sum((p**2).sum() for p in product))) for product in products]


@dataclass(frozen=True, eq=False)
class Row:
    """
    Attributes:
        ranks: of the four clients that most laws are tested with.
        roles: round -> the roles that train, which are also those that travel up.
        weights: replies -> what the server's mean is weighted with, up to a factor.
        index_bytes: bytes up that say where values belong.
        truncated: exact only up to the truncation to the largest rank of the run.
        slot: the slot of the roles; BASE for full fine-tuning.
    """

    method: str
    exact: bool
    mixed_ranks: bool
    personal: bool
    ranks: tuple[int, ...]
    upload: Callable[[Setup, Client, int, Any], int]
    download: Callable[[Setup, Client, int, int], int]
    roles: Callable[[int], frozenset[str]] = lambda round: BOTH
    weights: Callable[[Sequence[Reply]], list[float]] = n_k
    index_bytes: Callable[[Setup], int] = lambda setup: 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False
    slot: str = SHARED

    def make(self) -> Any:
        return make(self.method, self.settings)

    def trained(self, round: int) -> frozenset[Role]:
        return frozenset((self.slot, role) for role in self.roles(round))

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.settings.items())])


def all_parameters(setup: Setup) -> int:
    return sum(int(np.prod(shape)) for shape in setup.params.values())


def P(setup: Setup, rank: int, role: str) -> int:
    """The parameters of one factor at a rank."""
    return sum(rank * (d_out if role == "B" else d_in) for d_out, d_in in setup.shapes.values())


def both(setup: Setup, client: Client, *_: Any) -> int:
    return P(setup, client.rank, "A") + P(setup, client.rank, "B")


def odd_B_even_A(round: int) -> frozenset[str]:
    return frozenset("B" if round % 2 == 1 else "A")


def moved_since(setup: Setup, rank: int, round: int, last: int) -> int:
    """The factors that any round from `last` on has changed: a client keeps those that it started its last round with."""
    roles = {role for t in range(max(last, 1), round) for role in odd_B_even_A(t)}
    return sum(P(setup, rank, role) for role in roles)


def chosen_ranks(setup: Setup, client: Client, round: int, up: Any) -> int:
    """LoRA-A2: the chosen columns of B or rows of A."""
    axis = 0 if round % 2 == 1 else 1
    return sum(int(up.ranks[m].sum()) * setup.shapes[m][axis] for m in setup.shapes)


def lora_a2(ranks: tuple[int, ...], **settings: Any) -> Row:
    return Row(
        "lora-a2",
        exact=True,
        mixed_ranks=True,
        personal=False,
        ranks=ranks,
        upload=chosen_ranks,
        download=lambda setup, client, round, last: moved_since(setup, 4, round, last),
        roles=odd_B_even_A,
        index_bytes=lambda setup: len(setup.shapes) * ceil(4 / 8),
        settings={"global_rank": 4, **settings},
    )


def rolora(**settings: Any) -> Row:
    return Row(
        "rolora",
        exact=True,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, round, up: sum(P(setup, client.rank, role) for role in odd_B_even_A(round)),
        download=lambda setup, client, round, last: moved_since(setup, client.rank, round, last),
        roles=odd_B_even_A,
        weights=uniform if settings.get("uniform_weights", True) else n_k,
        settings=settings,
    )


ROWS = [
    Row(
        "fedavg",
        exact=True,
        mixed_ranks=True,
        personal=False,
        ranks=(1, 2, 4, 2),
        upload=lambda setup, client, round, up: all_parameters(setup),
        download=lambda setup, client, round, last: all_parameters(setup) if round > 1 else 0,
        roles=lambda round: frozenset("W"),
        slot=BASE,
    ),
    Row("fedit", exact=False, mixed_ranks=False, personal=False, ranks=(2, 2, 2, 2), upload=both, download=both),
    Row(
        "ffa-lora",
        exact=True,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, round, up: P(setup, client.rank, "B"),
        download=lambda setup, client, round, last: P(setup, client.rank, "B"),
        roles=lambda round: frozenset("B"),
    ),
    Row("flexlora", exact=True, mixed_ranks=True, personal=False, ranks=(1, 2, 4, 2), upload=both, download=both, truncated=True),
    # gamma = 1 never prunes, so that formulas in r_k hold; test_hetlora.py has the pruning.
    Row(
        "hetlora",
        exact=False,
        mixed_ranks=True,
        personal=False,
        ranks=(1, 2, 4, 2),
        upload=both,
        download=both,
        weights=product_norms,
        settings={"gamma": 1.0},
    ),
    rolora(),
    rolora(uniform_weights=False),
    lora_a2((1, 2, 4, 2)),
    lora_a2((4, 4, 4, 4)),
    lora_a2((1, 2, 4, 2), probe_reset=False),
    lora_a2((1, 2, 4, 2), probe_counts=True, criterion="sensitivity"),
    lora_a2((1, 2, 4, 2), criterion="magnitude"),
]
