"""Arithmetic on mappings from module to tensor, and means that fold as their terms arrive."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Flat(Mapping[str, Tensor]):
    """Tensors that lie one after the other in one vector, so that what is done to all of them is one operation, however many there
    are: trained adapters, messages and their means are such.

    Attributes:
        entries: (n,)
        shapes: module -> the shape of its tensor, in order; n numbers in all.
    """

    entries: Tensor
    shapes: Mapping[str, torch.Size]

    def __getitem__(self, module: str) -> Tensor:
        return self._views[module]

    def __contains__(self, module: object) -> bool:
        return module in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @cached_property
    def _views(self) -> dict[str, Tensor]:
        parts = torch.split(self.entries, [shape.numel() for shape in self.shapes.values()])
        return {m: part.view(shape) for (m, shape), part in zip(self.shapes.items(), parts, strict=True)}


def flat(tensors: Tensors) -> Flat:
    """The same tensors as one vector: a copy, unless they are one already."""
    if isinstance(tensors, Flat):
        return tensors
    entries = torch.cat([t.reshape(-1) for t in tensors.values()]) if tensors else torch.zeros(0)
    return Flat(entries, {m: t.shape for m, t in tensors.items()})


def each(f: Callable[..., Tensor], *maps: Tensors) -> dict[str, Tensor]:
    """f(x[m], y[m], ...) for every module m of the first map."""
    return {m: f(*(x[m] for x in maps)) for m in maps[0]}


def plus(x: Tensors, y: Tensors) -> Tensors:
    """x + y, module by module."""
    return _elementwise(torch.add, x, y)


def minus(x: Tensors, y: Tensors) -> Tensors:
    """x - y, module by module."""
    return _elementwise(torch.sub, x, y)


def weighted_mean(terms: Iterable[tuple[float, tuple[Tensors, ...]]]) -> tuple[Tensors, ...]:
    """sum_k w_k x_k / sum_k w_k for several mappings at once.

    Sums in float64 whatever the dtype of the terms, so equal terms give themselves back exactly, and memory does not grow
    with their number.

    Args:
        terms: (w_k, (x_k, y_k, ...)) with w_k >= 0 and not all zero; at least one. All x_k have one set of modules and shapes.
    """
    totals: list[Flat] = []
    dtypes: list[torch.dtype] = []
    weight = 0.0
    for w, maps in terms:
        if not totals:
            totals = [_blank(x) for x in maps]
            dtypes = [reduce(torch.promote_types, (t.dtype for t in x.values()), torch.bfloat16) for x in maps]
        weight += w
        for total, x in zip(totals, maps, strict=True):
            _add(total, x, w)
    return tuple(replace(total, entries=(total.entries / weight).to(dtype)) for total, dtype in zip(totals, dtypes, strict=True))


def padded_mean(terms: Iterable[tuple[float, tuple[Tensors, ...]]], like: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
    """The same of terms that may be smaller than the means, whose shapes are those of `like`: past its own ends a term counts as
    zero."""
    totals = [{m: torch.zeros_like(t, dtype=torch.float64) for m, t in x.items()} for x in like]
    weight = 0.0
    for w, maps in terms:
        weight += w
        for total, x in zip(totals, maps, strict=True):
            for m, t in x.items():
                total[m][tuple(map(slice, t.shape))].add_(t, alpha=w)
    return tuple({m: (total[m] / weight).to(x[m].dtype) for m in total} for total, x in zip(totals, like, strict=True))


def owners_mean(terms: Iterable[tuple[float, tuple[Tensors, ...]]], like: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
    """The same, where an entry's mean is over the terms that reach as far; zero where none does."""
    totals = [{m: torch.zeros_like(t, dtype=torch.float64) for m, t in x.items()} for x in like]
    weights = [{m: torch.zeros_like(t, dtype=torch.float64) for m, t in x.items()} for x in like]
    for w, maps in terms:
        for total, weight, x in zip(totals, weights, maps, strict=True):
            for m, t in x.items():
                where = tuple(map(slice, t.shape))
                total[m][where].add_(t, alpha=w)
                weight[m][where].add_(w)
    return tuple(
        {m: torch.where(weight[m] > 0, total[m] / weight[m], 0.0).to(x[m].dtype) for m in total}
        for total, weight, x in zip(totals, weights, like, strict=True)
    )


def _blank(like: Tensors) -> Flat:
    """Zeros in float64 of these shapes."""
    shapes = {m: t.shape for m, t in like.items()}
    device = next((t.device for t in like.values()), None)
    return Flat(torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=torch.float64, device=device), shapes)


def _add(total: Flat, x: Tensors, weight: float) -> None:
    if isinstance(x, Flat):
        total.entries.add_(_in_order(x, total).entries, alpha=weight)
        return
    for m, shape in total.shapes.items():
        if x[m].shape != shape:
            raise ValueError(f"shapes differ: '{m}' is {tuple(x[m].shape)}, and {tuple(shape)} in the first term")
        total[m].add_(x[m], alpha=weight)


def _elementwise(f: Callable[[Tensor, Tensor], Tensor], x: Tensors, y: Tensors) -> Tensors:
    """`each`, in one step where x is flat; then the result is, too."""
    if not isinstance(x, Flat):
        return each(f, x, y)
    return replace(x, entries=f(x.entries, _in_order(y, x).entries))


def _in_order(x: Tensors, like: Flat) -> Flat:
    """x with the modules of another one in its order. ValueError when shapes differ, KeyError when a module is missing."""
    x = flat(x)
    if list(x.shapes.items()) == list(like.shapes.items()):
        return x
    if any(x.shapes[m] != shape for m, shape in like.shapes.items()):
        raise ValueError(f"shapes differ: {dict(x.shapes)} and {dict(like.shapes)}")
    return flat({m: x[m] for m in like})
