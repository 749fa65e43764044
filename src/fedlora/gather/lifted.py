"""Ups whose fields all have one shape, and their mean: what sums without single replies are made of.

An Up may hold a part of its entries only, and say by `index` fields which. Lifted, it holds all of them, zero where it held none.
Of a method with `FACTS.linear` the server learns as much from the mean of the lifted Ups as from each: secure sums, noise at the
server and robust rules then need no help of the method's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.algebra.tensors import weighted_mean

Up = Any  # a method's own dataclass


def kinds(up: Up) -> dict[str, tuple[str, Any]]:
    """Field -> (kind, dims), of those that are declared."""
    return {f.name: (f.metadata["kind"], f.metadata["dims"]) for f in fields(up) if "kind" in f.metadata}


def lift(up: Up) -> Up:
    """The same Up with every index full and zeros in the entries that it did not hold."""
    declared = kinds(up)
    axes = {dims[0]: getattr(up, name) for name, (kind, dims) in declared.items() if kind == "index"}
    changes: dict[str, Any] = {}
    for name, (kind, dims) in declared.items():
        part: Mapping[str, Tensor] = getattr(up, name)
        if kind == "index":
            changes[name] = {m: torch.ones_like(mask) for m, mask in part.items()}
        for axis in (i for i, dim in enumerate(dims) if kind == "change" and dim in axes):
            part = {m: _spread(x, axis, axes[dims[axis]][m]) for m, x in part.items()}
            changes[name] = part
    return replace(up, **changes)


def lifted_mean(weighted: Iterable[tuple[float, Up]]) -> Up:
    """The weighted mean of lifted Ups, all of which hold changes only; each is forgotten when the next one comes.

    Raises:
        ValueError: an Up holds a value or a statistic, of which a mean means nothing.
    """
    first: list[Up] = []

    def term(weight: float, up: Up) -> tuple[float, tuple[Any, ...]]:
        held = [name for name, (kind, _) in kinds(up).items() if kind in ("value", "statistic") and getattr(up, name)]
        if held:
            raise ValueError(f"{type(up).__name__} holds {', '.join(held)}: only changes have a mean")
        up = lift(up)
        if not first:
            first.append(up)
        return weight, tuple(getattr(up, name) for name, (kind, _) in kinds(up).items() if kind == "change")

    means = weighted_mean(term(weight, up) for weight, up in weighted)
    names = [name for name, (kind, _) in kinds(first[0]).items() if kind == "change"]
    return replace(first[0], **dict(zip(names, means, strict=True)))


def _spread(x: Tensor, axis: int, mask: Tensor) -> Tensor:
    """The entries of x along an axis in the places that the mask chooses, zero in the others."""
    shape = list(x.shape)
    shape[axis] = len(mask)
    return x.new_zeros(shape).index_copy(axis, mask.nonzero().flatten(), x)
