"""What is watched of a round's clients, in simulations: how alike their updates are, and what averaging their factors apart would
get wrong.

    similarity     the cosine of every two clients' local updates, as products s B A over all modules
    discordance    ||mean of products - product of means|| / ||mean of products - start||

Both of what clients trained, before any transform and whatever the method then makes of it: the discordance is that of naive
averaging (FedIT's), on this run. Where one factor rests it is zero, which is why methods freeze one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.algebra.discord import discord, update_gram
from fedlora.algebra.lowrank import pad_rank
from fedlora.types import ROLES, Diagnostics, Factors, Slots

MOST_CLIENTS = 32  # a round's first ones: the cost grows with the square of their number


@dataclass(frozen=True)
class LocalUpdate:
    """What one client's local training did: its slots when it began and when it was done."""

    id: int
    num_examples: int
    before: Slots
    after: Slots


def similarity(updates: Sequence[LocalUpdate]) -> Diagnostics:
    """`similarity` (K, K) in float32 of `similarity_clients` (K,), and `discordance`, for the first 32 clients.

    A client that moved nothing has the similarity 0 to everybody. `discordance` is absent where it is not defined: clients whose
    slots or ranks differ, a C or D beside an A and B that moved, no update at all. Full fine-tuning, without slots, gives nothing.
    """
    clients = sorted(updates, key=lambda each: each.id)[:MOST_CLIENTS]
    places = [_places(each) for each in clients]
    if not any(places):
        return {}
    inner = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    weights = [float(each.num_examples) for each in clients]
    squares = 0.0
    for slot, module in dict.fromkeys(place for own in places for place in own):
        here = [i for i, own in enumerate(places) if (slot, module) in own]
        B0, A0 = _stacks([clients[i].before[slot] for i in here], module)
        B, A = _stacks([clients[i].after[slot] for i in here], module)
        at = torch.tensor(here)
        inner[at[:, None], at] += update_gram(B0, A0, B, A).cpu()
        squares += discord([weights[i] for i in here], B, A) ** 2
    found: dict[str, Any] = {"similarity": _cosine(inner), "similarity_clients": torch.tensor([each.id for each in clients])}
    w = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    moved = float(w @ inner @ w)
    # Averaging factors apart means something where everybody has the same, and the factors are all there is.
    alike = all(own == places[0] for own in places)
    if moved > 0 and alike and all(_plain(each, places[0]) for each in clients):
        found["discordance"] = (squares / moved) ** 0.5
    return found


def _places(each: LocalUpdate) -> dict[tuple[str, str], torch.Size]:
    """Where a client has factors before and after: (slot, module) -> the shape of its A."""
    shared = [slot for slot in each.after if slot in each.before]
    return {(slot, m): A.shape for slot in shared for m, A in each.after[slot].A.items() if m in each.before[slot].A}


def _stacks(slots: Sequence[Factors], m: str) -> tuple[Tensor, Tensor]:
    """B (K, d_out, r) and A (K, r, d_in) of one module, with scale, C and D in B; a smaller rank is filled with zeros. K is 1 for
    a factor that all clients have in common."""
    first = slots[0]
    same = (slot.scale == first.scale and slot.role(r).get(m) is first.role(r).get(m) for slot in slots for r in ROLES)
    if all(same):
        slots = [first]  # the start of everybody, as a rule
    B, A = [slot.left(m) for slot in slots], [slot.A[m] for slot in slots]
    rank = max(map(len, A))
    if any(len(x) < rank for x in A):
        B, A = map(list, zip(*(pad_rank(b, a, rank) for b, a in zip(B, A, strict=True)), strict=True))
    return _stack(B), _stack(A)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    return first[None] if all(x is first or torch.equal(x, first) for x in tensors) else torch.stack(list(tensors))


def _cosine(inner: Tensor) -> Tensor:
    length = inner.diagonal().clamp_min(0).sqrt()
    length = torch.where(length > 0, length, torch.inf)
    return (inner / length / length[:, None]).clamp(-1, 1).float()


def _plain(each: LocalUpdate, places: Iterable[tuple[str, str]]) -> bool:
    """Whether no C or D stands beside an A or B that moved."""

    def rests(role: str, slot: str, m: str) -> bool:
        return torch.equal(each.before[slot].role(role)[m], each.after[slot].role(role)[m])

    scaled = [(slot, m) for slot, m in places if m in each.after[slot].C or m in each.after[slot].D]
    return all(rests("A", slot, m) and rests("B", slot, m) for slot, m in scaled)
