"""Clipping: u <- u min(1, max_norm / ||u||), the L2 norm over all changes of a client together. They stay fp32."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.algebra.tensors import each
from fedlora.errors import BadInput
from fedlora.types import Tensors


@dataclass(frozen=True)
class Clip:
    """
    Attributes:
        max_norm: the largest norm that is left as it is.
        bare: what may travel untouched beside the changes: names of a method's index and statistic fields, or "head".
    """

    max_norm: float
    bare: tuple[str, ...] = ()

    error_feedback: ClassVar[bool] = False
    numbers_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < float("inf"):
            raise BadInput("max_norm must be positive and finite")

    def encode(self, changes: Tensors, rng: np.random.Generator) -> tuple[Tensors, None]:
        norm = sum(float(x.double().square().sum()) for x in changes.values()) ** 0.5
        factor = self.max_norm / norm if norm > self.max_norm else 1.0
        return each(lambda x: x * factor, changes), None

    def decode(self, numbers: Tensors, side: None) -> Tensors:
        return numbers
