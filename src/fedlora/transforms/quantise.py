"""Coarser numbers: bf16, or integers of 8 or 4 bits with one fp32 scale a row.

    scale = max |row| / L,   code = round(x / scale) in -L .. L,   L = 127 or 7;   the server reads code * scale

A row runs along the longer axis of a matrix (the rows of A, the columns of B), so that a factor has as few scales as ranks; a
vector is one row. Stochastic rounding goes up with the probability of the fraction, so that the mean of what arrives is x, at an
error of one step at most; rounding to the nearest errs by half a step. Two codes of 4 bits share a byte. It must be the last
transform.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlora.algebra.tensors import each
from fedlora.types import Tensors


class Format(Enum):
    """What travels for each number."""

    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


LEVELS = {Format.INT8: 127, Format.INT4: 7}


@dataclass(frozen=True)
class Scales:
    """
    Attributes:
        scale: name -> the scale of each row, shaped so that it broadcasts against the tensor; empty for bf16.
        shapes: name -> the shape of the tensor, which packed codes have lost; empty but for int4.
    """

    scale: Tensors
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Quantise:
    """
    Attributes:
        to: the format.
        stochastic: unbiased rounding, for int8 and int4; bf16 always takes the nearest.
        error_feedback: the client keeps what rounding lost and adds it to its next changes.
    """

    to: Format = Format.INT8
    stochastic: bool = True
    error_feedback: bool = True

    bare: ClassVar[None] = None

    @property
    def numbers_out(self) -> bool:
        return False

    def encode(self, changes: Tensors, rng: np.random.Generator) -> tuple[Tensors, Scales]:
        if self.to is Format.BF16:
            return each(lambda x: x.to(torch.bfloat16), changes), Scales({}, {})
        scale = each(self._scale, changes)
        codes = each(lambda x, s: self._round(x / torch.where(s > 0, s, 1.0), rng), changes, scale)
        if self.to is Format.INT8:
            return codes, Scales(scale, {})
        return each(_pack, codes), Scales(scale, {name: tuple(x.shape) for name, x in changes.items()})

    def decode(self, numbers: Tensors, side: Scales) -> Tensors:
        if self.to is Format.BF16:
            return each(lambda x: x.to(torch.float32), numbers)
        codes = numbers if self.to is Format.INT8 else {n: _unpack(x, side.shapes[n]) for n, x in numbers.items()}
        return each(lambda code, s: code.to(s.dtype) * s, codes, side.scale)

    def _scale(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(x.shape)
        along = max(range(x.ndim), key=lambda axis: x.shape[axis]) if x.ndim else ()
        return x.abs().amax(dim=along, keepdim=True) / LEVELS[self.to]

    def _round(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        if self.stochastic:
            x = (x + torch.from_numpy(rng.random(tuple(x.shape))).to(x.dtype)).floor()
        return x.round().clamp(-LEVELS[self.to], LEVELS[self.to]).to(torch.int8)


def _pack(codes: Tensor) -> Tensor:
    """Two codes of -7 .. 7 to a byte, flat; an odd last one has a zero beside it."""
    flat = (codes.flatten() + 8).to(torch.uint8)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_full((1,), 8)])
    return flat[::2] * 16 + flat[1::2]


def _unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(packed) != (prod(shape) + 1) // 2:
        raise ValueError(f"{len(packed)} bytes of codes for a tensor of {shape}")
    pairs = torch.stack([packed // 16, packed % 16], dim=1).flatten()
    return (pairs[: prod(shape)].to(torch.int8) - 8).view(shape)
