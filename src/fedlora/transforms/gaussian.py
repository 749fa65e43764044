"""Gaussian noise: u <- u + N(0, scale^2) on every entry. Changes stay fp32.

The run's seed draws it, so that a run repeats bit for bit: this measures what privacy costs in accuracy. Whoever knows the seed can
take the noise away again, and nothing here counts (epsilon, delta).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedlora.algebra.tensors import each
from fedlora.errors import BadInput
from fedlora.types import Tensors


@dataclass(frozen=True)
class Gaussian:
    """
    Attributes:
        scale: the standard deviation; after clipping to C, a noise multiplier z is scale = z C.
        bare: what may travel untouched beside the changes: names of a method's index and statistic fields, or "head".
    """

    scale: float
    bare: tuple[str, ...] = ()

    error_feedback: ClassVar[bool] = False
    numbers_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise BadInput("scale must be positive and finite")

    def encode(self, changes: Tensors, rng: np.random.Generator) -> tuple[Tensors, None]:
        return each(lambda x: x + torch.from_numpy(rng.normal(0.0, self.scale, tuple(x.shape))).to(x.dtype), changes), None

    def decode(self, numbers: Tensors, side: None) -> Tensors:
        return numbers
