"""Every method: one file each, and the folder is the list.

A file `lora_a2.py` holds the method `lora-a2`: the one class in it that has FACTS; a file without one is no method. A method from
elsewhere is named "package.module:Class".
"""

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fedlora.errors import BadInput, first_line, unknown
from fedlora.settings import build
from fedlora.types import Method


def names() -> list[str]:
    """The methods of the package, in alphabetical order."""
    return _defined_in(files(__name__))


def _defined_in(folder: Traversable) -> list[str]:
    """The files that define a class with FACTS, by their text: to import them all would take torch."""
    texts = {file.name.removesuffix(".py"): file.read_text() for file in folder.iterdir() if file.name.endswith(".py")}
    return sorted(name.replace("_", "-") for name, text in texts.items() if re.search(r"^ +FACTS\b.*=", text, re.M))


def find(name: str) -> type[Any]:
    """The class of a method, by its name here or by "package.module:Class". BadInput when there is none."""
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            found: type[Any] = getattr(import_module(module_name), class_name)
        except Exception as error:  # the module is somebody's program, and may fail in any way
            raise BadInput(f"method.name = '{name}': {first_line(error)}") from error
        if not (isinstance(found, type) and is_dataclass(found) and hasattr(found, "FACTS")):
            raise BadInput(f"method.name = '{name}': this is no method, which is a dataclass with FACTS")
        return found
    if name not in names():
        raise unknown("method", name, names())
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__ and "FACTS" in vars(c))


def make(name: str, settings: Mapping[str, Any]) -> Method:
    """The method with these hyper-parameters. BadInput names a field it does not have or a value it cannot take."""
    method: Method = build(find(name), settings, "config key", "method.")
    return method
