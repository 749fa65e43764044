"""Every task: what models are fine-tuned for. One file each, and the folder is the list.

A file `text_classification.py` holds the task of that name: the one class in it that is called `TASK` there. A task from elsewhere
is named "package.module:Class".
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fedlora.errors import unknown
from fedlora.listed import defined_in, elsewhere
from fedlora.settings import build
from fedlora.tables import merge

if TYPE_CHECKING:
    from fedlora.tasks.base import Task


def names() -> list[str]:
    """The tasks of the package, in alphabetical order."""
    return defined_in(files(__name__), r"^TASK\b.*=")


def find(name: str) -> type[Any]:
    """The class of a task, by its name here or by "package.module:Class". BadInput when there is none."""
    what = "this is no task, which is a dataclass as `fedlora.tasks.base.Task` says"
    found = elsewhere(name, "task.name", lambda kind: hasattr(kind, "bind"), what)
    if found is not None:
        return found
    if name not in names():
        raise unknown("task", name, names())
    kind: type[Any] = import_module(f"{__name__}.{name}").TASK
    return kind


def defaults(*layers: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tables that suit the task which these layers of tables name, to be laid below them; none where they name no task, which
    is said when they are checked."""
    table = merge(*layers).get("task")
    name = table.get("name") if isinstance(table, Mapping) else None
    return find(name).DEFAULTS if isinstance(name, str) and (":" in name or name in names()) else {}


def columns(name: Any, keys: Mapping[str, Any]) -> frozenset[str] | None:
    """The columns of tables that a task may use; None where it may be any.

    Args:
        keys: the table [data], which names columns; in a comparison, where any key may hold a list, so may `name`.
    """
    if name not in names():
        return None
    kind = find(name)
    named = (keys.get(key) for key in (*kind.COLUMNS, "column"))
    return frozenset((*kind.FOUND, *(x for each in named for x in ([each] if isinstance(each, str) else each or ()))))


def make(name: str, settings: Mapping[str, Any]) -> "Task":
    """The task with these settings. BadInput names a field it does not have or a value it cannot take."""
    task: Task = build(find(name), settings, "config key", "task.")
    return task
