"""Arithmetic on mappings from module to tensor, and means that fold as their terms arrive."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def each(f: Callable[..., Tensor], *maps: Tensors) -> dict[str, Tensor]:
    """f(x[m], y[m], ...) for every module m of the first map."""
    return {m: f(*(x[m] for x in maps)) for m in maps[0]}


def plus(x: Tensors, y: Tensors) -> dict[str, Tensor]:
    """x + y, module by module."""
    return each(torch.add, x, y)


def minus(x: Tensors, y: Tensors) -> dict[str, Tensor]:
    """x - y, module by module."""
    return each(torch.sub, x, y)


def weighted_mean(
    terms: Iterable[tuple[float, tuple[Tensors, ...]]], padded: tuple[Tensors, ...] = ()
) -> tuple[dict[str, Tensor], ...]:
    """sum_k w_k x_k / sum_k w_k for several mappings at once.

    Sums in float64 whatever the dtype of the terms, so equal terms give themselves back exactly, and memory does not grow
    with their number.

    Args:
        terms: (w_k, (x_k, y_k, ...)) with w_k >= 0 and not all zero; at least one.
        padded: mappings of the shapes of the means; terms count as zero past their own ends. Left out, all terms have one shape.
    """
    totals: tuple[dict[str, Tensor], ...] = ()
    like = padded
    weight = 0.0
    for w, maps in terms:
        if not totals:
            like = padded or maps
            totals = tuple({m: torch.zeros_like(t, dtype=torch.float64) for m, t in x.items()} for x in like)
        weight += w
        for total, x in zip(totals, maps, strict=True):
            for m, t in x.items():
                into = total[m][tuple(map(slice, t.shape))] if padded else total[m]
                into.add_(t, alpha=w)
    return tuple({m: (total[m] / weight).to(x[m].dtype) for m in total} for total, x in zip(totals, like, strict=True))
