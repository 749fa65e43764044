"""What may be done to a client's changes before they leave it: one file each, and the folder is the list.

A recipe names them in order, each with its own fields beside its name:

    [[transform]]
    name = "clip"
    max_norm = 1.0

    [[transform]]
    name = "quantise"
    to = "int8"

Each is a frozen dataclass of its settings with two functions of values, over all changes of an Up together:

    encode(changes, rng) -> (numbers, side)     what travels: numbers, and what else it takes to read them
    decode(numbers, side) -> changes            what the server makes of it

`changes` and `numbers` map names to tensors. Numbers are what the next transform acts on. What a transform with `error_feedback`
loses, changes - decode(encode(changes)), is kept by the client and added to its next changes, so that nothing is lost for good.
"""

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from importlib.resources import files
from typing import Any, Protocol

import numpy as np

from fedlora.errors import unknown
from fedlora.listed import defined_in
from fedlora.settings import build
from fedlora.types import Tensors


class Transform(Protocol):
    """See the module's text."""

    @property
    def error_feedback(self) -> bool:
        """Whether what encoding loses is added to the next changes."""

    @property
    def numbers_out(self) -> bool:
        """Whether what it leaves is still numbers that another transform can act on."""

    @property
    def bare(self) -> tuple[str, ...] | None:
        """Of a transform that is there to tell less of the data: what else may travel as it is. None: it only saves bytes."""

    def encode(self, changes: Tensors, rng: np.random.Generator) -> tuple[Tensors, Any]:
        """(numbers, side): what travels, and what else it takes to read it."""

    def decode(self, numbers: Tensors, side: Any) -> Tensors:
        """What the server makes of it."""


def names() -> list[str]:
    """The transforms of the package, in alphabetical order."""
    return defined_in(files(__name__), r"^    def encode\(")


def find(name: str) -> type[Any]:
    if name not in names():
        raise unknown("transform", name, names())
    module = import_module(f"{__name__}.{name}")
    own = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    return next(c for c in own if hasattr(c, "encode"))


def make(name: str, settings: Mapping[str, Any]) -> Transform:
    """The transform with these settings. BadInput names a field that it does not have, lacks, or cannot take."""
    transform: Transform = build(find(name), settings, "field of a transform", f"{name}.", "transform ")
    return transform


def message_classes() -> list[type[Any]]:
    """The dataclasses that a transform's side may hold."""
    modules = [import_module(f"{__name__}.{name}") for name in names()]
    own = [c for module in modules for c in vars(module).values() if getattr(c, "__module__", None) == module.__name__]
    return [c for c in own if isinstance(c, type) and is_dataclass(c) and not hasattr(c, "encode")]
