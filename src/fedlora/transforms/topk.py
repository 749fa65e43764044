"""Sparse changes: only the floor(density n) entries of largest magnitude of all n travel, one at least and zeros never.

Where they belong travels with them: a bit for each entry of a tensor, or 32 for each that is kept, whichever is less.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, prod
from typing import ClassVar

import numpy as np
import torch

from fedlora.algebra.sparse import largest
from fedlora.algebra.tensors import each
from fedlora.errors import BadInput
from fedlora.types import Tensors


@dataclass(frozen=True)
class Places:
    """
    Attributes:
        where: name -> the entries of the flat tensor that are there: one bool for each, or int32 positions.
        shapes: name -> the shape of the whole tensor.
    """

    where: Tensors
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TopK:
    """
    Attributes:
        density: the share of entries that travels.
        error_feedback: the client keeps what did not travel and adds it to its next changes.
    """

    density: float
    error_feedback: bool = True

    bare: ClassVar[None] = None
    numbers_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise BadInput("density lies in (0, 1]")

    def encode(self, changes: Tensors, rng: np.random.Generator) -> tuple[Tensors, Places]:
        masks = each(torch.flatten, largest(changes, max(1, floor(self.density * sum(x.numel() for x in changes.values())))))
        positions = {name: mask.nonzero().flatten().to(torch.int32) for name, mask in masks.items()}
        where = {name: mask if 32 * len(positions[name]) >= len(mask) else positions[name] for name, mask in masks.items()}
        kept = each(lambda x, at: x.flatten()[at.long()], changes, positions)
        return kept, Places(where, {name: tuple(x.shape) for name, x in changes.items()})

    def decode(self, numbers: Tensors, side: Places) -> Tensors:
        changes = {}
        for name, values in numbers.items():
            where, shape = side.where[name], side.shapes[name]
            flat = values.new_zeros(prod(shape))
            flat[where if where.dtype == torch.bool else where.long()] = values
            changes[name] = flat.view(shape)
        return changes
