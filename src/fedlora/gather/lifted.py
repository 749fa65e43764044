"""Ups whose fields all have one shape, and their mean: what sums without single replies are made of.

An Up may hold a part of its entries only, and say by `index` fields which. Lifted, it holds all of them, zero where it held none.
Of a method with `FACTS.linear` the server learns as much from the mean of the lifted Ups as from each: secure sums, noise at the
server and robust rules then need no help of the method's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fedlora.algebra.tensors import owners_mean, weighted_mean
from fedlora.types import declared

Up = Any  # a method's own dataclass


def lift(up: Up) -> Up:
    """The same Up with every index full and zeros in the entries that it did not hold."""
    kinds = declared(up)
    axes = {dims[0]: getattr(up, name) for name, (kind, dims) in kinds.items() if kind == "index"}
    changes: dict[str, Any] = {}
    for name, (kind, dims) in kinds.items():
        part: Mapping[str, Tensor] = getattr(up, name)
        if kind == "index":
            changes[name] = {m: torch.ones_like(mask) for m, mask in part.items()}
        for axis in (i for i, dim in enumerate(dims) if kind == "change" and dim in axes):
            part = {m: _spread(x, axis, axes[dims[axis]][m]) for m, x in part.items()}
            changes[name] = part
    return replace(up, **changes)


def lifted_mean(weighted: Iterable[tuple[float, Up]], ranks: int | None = None) -> Up:
    """The weighted mean of lifted Ups, all of which hold changes only; each is forgotten when the next one comes.

    Args:
        ranks: of a method with `FACTS.holders`, the most ranks that an Up has: the mean of an entry is then over the Ups that reach
            as far, and zero where none does.

    Raises:
        ValueError: an Up holds a value or a statistic, of which a mean means nothing.
    """
    first: list[Up] = []

    def term(weight: float, up: Up) -> tuple[float, tuple[Any, ...]]:
        held = [name for name, (kind, _) in declared(up).items() if kind in ("value", "statistic") and getattr(up, name)]
        if held:
            raise ValueError(f"{type(up).__name__} holds {', '.join(held)}: only changes have a mean")
        up = lift(up)
        if not first:
            first.append(up)
        return weight, tuple(getattr(up, name) for name in _changes(up))

    terms = (term(weight, up) for weight, up in weighted)
    if ranks is None:
        means = weighted_mean(terms)
    else:
        one = next(terms)  # the others have its shapes, but for ranks
        means = owners_mean(chain([one], terms), tuple(_blank(first[0], name, ranks) for name in _changes(first[0])))
    return replace(first[0], **dict(zip(_changes(first[0]), means, strict=True)))


def _changes(up: Up) -> list[str]:
    """The names of its changes."""
    return [name for name, (kind, _) in declared(up).items() if kind == "change"]


def _blank(up: Up, name: str, ranks: int) -> dict[str, Tensor]:
    """Zeros in the shapes of a field of an Up with so many ranks."""
    _, dims = declared(up)[name]
    part: Mapping[str, Tensor] = getattr(up, name)
    shapes = {m: [ranks if axis == "rank" else n for axis, n in zip(dims, x.shape, strict=True)] for m, x in part.items()}
    return {m: x.new_zeros(shapes[m]) for m, x in part.items()}


def _spread(x: Tensor, axis: int, mask: Tensor) -> Tensor:
    """The entries of x along an axis in the places that the mask chooses, zero in the others."""
    shape = list(x.shape)
    shape[axis] = len(mask)
    return x.new_zeros(shape).index_copy(axis, mask.nonzero().flatten(), x)
