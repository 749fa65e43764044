"""Laplace noise: u <- u + Laplace(0, scale) on every entry, of variance 2 scale^2. Changes stay fp32.

The run's seed draws it, so that a run repeats bit for bit: this measures what privacy costs in accuracy. Whoever knows the seed can
take the noise away again, and nothing here counts epsilon.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedlora.algebra.tensors import each
from fedlora.errors import BadInput
from fedlora.types import Tensors


@dataclass(frozen=True)
class Laplace:
    """
    Attributes:
        scale: the mean of the noise's magnitude.
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
        return each(lambda x: x + torch.from_numpy(rng.laplace(0.0, self.scale, tuple(x.shape))).to(x.dtype), changes), None

    def decode(self, numbers: Tensors, side: None) -> Tensors:
        return numbers
