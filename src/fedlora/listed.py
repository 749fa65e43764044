"""Folders that are lists: each file that defines a thing of the folder's kind is one, by the name of the file. A thing from
elsewhere is named "package.module:Class"."""

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from importlib import import_module
from importlib.resources.abc import Traversable
from typing import Any

from fedlora.errors import BadInput, first_line


def defined_in(folder: Traversable, pattern: str) -> list[str]:
    """The files, without ".py" and in alphabetical order, with a line that `pattern` matches: found by their text, for to import
    them all would take torch, or packages that are not there."""
    files = [file for file in folder.iterdir() if file.name.endswith(".py") and not file.name.startswith("_")]
    return sorted(file.name.removesuffix(".py") for file in files if re.search(pattern, file.read_text(), re.M))


def elsewhere(name: str, key: str, fits: Callable[[type[Any]], bool], what: str) -> type[Any] | None:
    """The dataclass of a name "package.module:Class"; None of another name.

    Args:
        key: of the configuration, which has the name.
        fits: whether a dataclass is of the kind that is wanted.
        what: what is said of one that is not.

    Raises:
        BadInput: there is no such class, or it is of another kind.
    """
    if ":" not in name:
        return None
    module, _, attribute = name.partition(":")
    try:
        found: type[Any] = getattr(import_module(module), attribute)
    except Exception as error:  # the module is somebody's program, and may fail in any way
        raise BadInput(f"{key} = '{name}': {first_line(error)}") from error
    if not (isinstance(found, type) and is_dataclass(found) and fits(found)):
        raise BadInput(f"{key} = '{name}': {what}")
    return found
