"""Every task: what models are fine-tuned for. One file each, and the folder is the list.

A file `text_classification.py` holds the task of that name: the one class in it that is called `TASK` there. A task from elsewhere
is named "package.module:Class".
"""

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fedlora.errors import BadInput, first_line, unknown
from fedlora.settings import build

if TYPE_CHECKING:
    from fedlora.tasks.base import Task


def names() -> list[str]:
    """The tasks of the package, in alphabetical order: found by their text, for to import them all would take torch."""
    texts = {file.name: file.read_text() for file in files(__name__).iterdir() if file.name.endswith(".py")}
    return sorted(name.removesuffix(".py") for name, text in texts.items() if re.search(r"^TASK\b.*=", text, re.M))


def find(name: str) -> type[Any]:
    """The class of a task, by its name here or by "package.module:Class". BadInput when there is none."""
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            found: type[Any] = getattr(import_module(module_name), class_name)
        except Exception as error:  # the module is somebody's program, and may fail in any way
            raise BadInput(f"task.name = '{name}': {first_line(error)}") from error
        if not (isinstance(found, type) and is_dataclass(found) and hasattr(found, "bind")):
            raise BadInput(f"task.name = '{name}': this is no task, which is a dataclass as `fedlora.tasks.base.Task` says")
        return found
    if name not in names():
        raise unknown("task", name, names())
    kind: type[Any] = import_module(f"{__name__}.{name}").TASK
    return kind


def make(name: str, settings: Mapping[str, Any]) -> "Task":
    """The task with these settings. BadInput names a field it does not have or a value it cannot take."""
    task: Task = build(find(name), settings, "config key", "task.")
    return task
