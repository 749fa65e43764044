"""Which texts of which clients share a forward pass, and putting together what comes back."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedlora.data.encoded import Encoded
from fedlora.models.packing import Form, Shared, sharing
from fedlora.models.slots import Weight
from fedlora.types import Factors, Gate

ALIGNED = 32  # what a client's tokens in a pass are filled up to a multiple of

Some = TypeVar("Some")
Piece = tuple[int, np.ndarray]  # of which part, and the positions of some of its texts


@dataclass(frozen=True)
class Part:
    """One client's share of a forward pass: its examples and what they pass through."""

    data: Encoded
    slots: Mapping[str, Factors]
    gate: Gate | None
    weights: Mapping[str, Weight]  # of slots, one or one for each example; absent counts as 1
    head: Mapping[str, Tensor]


def passes(parts: Sequence[Part], form: Form) -> Iterator[list[Piece]]:
    """The texts of each forward pass, as the model's form has it; positions ascend."""
    apart = form.apart or (not form.split and any(part.head for part in parts))
    for group in [[i] for i in range(len(parts))] if apart else [range(len(parts))]:
        sizes = [len(parts[i].data) for i in group]
        owner, place = np.repeat(group, sizes), np.concatenate([np.arange(n) for n in sizes])
        lengths = np.concatenate([parts[i].data.sizes for i in group])
        # Rows that are no tokens cannot be weighed by text.
        weighed = form.apart and any(isinstance(w, Tensor) for i in group for w in parts[i].weights.values())
        for where in sharing(Shared.ONE_TEXT if weighed else form.shared, lengths):
            yield [(int(i), place[where[owner[where] == i]]) for i in np.unique(owner[where])]


def in_order(pieces: Sequence[Tensor], where: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """The rows of all pieces, each at its position."""
    return torch.cat(list(pieces))[torch.from_numpy(np.argsort(np.concatenate(where))).to(device)]


def take(part: Part, where: np.ndarray) -> Part:
    """Some of the examples of a part."""
    chosen = torch.from_numpy(where)
    weights = {s: w[chosen.to(w.device)] if isinstance(w, Tensor) else w for s, w in part.weights.items()}
    return replace(part, data=part.data.take(where), weights=weights)


def filled_up(data: Encoded) -> Encoded:
    """The texts, and after them some that nobody asks for, so that clients have few numbers of tokens: the beginning of the last
    text, again and again. Of few tokens at most a third are added."""
    tokens = sum(map(len, data.inputs))
    step = min(ALIGNED, max(1, 1 << (tokens // 4).bit_length() >> 1))
    last, missing = data.inputs[-1], -tokens % step
    more = [last[: missing - done] for done in range(0, missing, len(last))]
    none = tuple(np.zeros(len(x), dtype=bool) for x in more) if data.trained else ()
    filled = data.take(np.array([*range(len(data)), *[len(data) - 1] * len(more)]))
    return replace(filled, inputs=(*data.inputs, *more), trained=(*data.trained, *none))


def by_tokens(sizes: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Positions of consecutive examples of these sizes, (n,), at most `limit` tokens together, or one example."""
    start = 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sizes[start : end + 1].sum() > limit:
            yield np.arange(start, end)
            start = end


def fill(pieces: Iterable[Some], size: Callable[[Some], int], limit: int) -> Iterator[list[Some]]:
    """Consecutive pieces in groups of at most `limit`, or of one piece."""
    group: list[Some] = []
    total = 0
    for piece in pieces:
        if group and total + size(piece) > limit:
            yield group
            group, total = [], 0
        group.append(piece)
        total += size(piece)
    if group:
        yield group
