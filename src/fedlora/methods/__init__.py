"""Every method: one file each, and the folder is the list.

A file `lora_a2.py` holds the method `lora-a2`: the one class in it that has FACTS; a file without one is no method. A method from
elsewhere is named "package.module:Class".
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fedlora.errors import unknown
from fedlora.listed import defined_in, elsewhere
from fedlora.settings import build
from fedlora.types import Method


def names() -> list[str]:
    """The methods of the package, in alphabetical order."""
    return _defined_in(files(__name__))


def _defined_in(folder: Traversable) -> list[str]:
    """The files that define a class with FACTS."""
    return sorted(name.replace("_", "-") for name in defined_in(folder, r"^ +FACTS\b.*="))


def find(name: str) -> type[Any]:
    """The class of a method, by its name here or by "package.module:Class". BadInput when there is none."""
    what = "this is no method, which is a dataclass with FACTS"
    found = elsewhere(name, "method.name", lambda kind: hasattr(kind, "FACTS"), what)
    if found is not None:
        return found
    if name not in names():
        raise unknown("method", name, names())
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__ and "FACTS" in vars(c))


def make(name: str, settings: Mapping[str, Any]) -> Method:
    """The method with these hyper-parameters. BadInput names a field it does not have or a value it cannot take."""
    method: Method = build(find(name), settings, "config key", "method.")
    return method
