"""Nested tables of a configuration, before anything is checked: laid over each other, with a key each, by their dotted names."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.errors import BadInput

# Tables with a name -> the fields that are of one name alone; None is all of them.
OWN: Mapping[str, frozenset[str] | None] = {"method": None, "task": None, "transport": frozenset({"workers", "address"})}
OLD = {"clients.tasks": "clients.domains"}  # keys in files of earlier versions -> what they are called now


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables laid over each other, the later ones winning; the fields of one method, task or transport do not carry
    over to another. Keys of earlier versions get their names of today."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, renamed(layer, OLD))
    return merged


def renamed(tables: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Nested tables with some keys renamed: "table.key" -> "table.other"."""
    found = dict(tables)
    for old, new in names.items():
        table, _, key = old.partition(".")
        own = found.get(table)
        if isinstance(own, Mapping) and key in own:
            if new.rpartition(".")[2] in own:
                raise BadInput(f"{old} is what {new} was called before, and both are given; give {new} alone")
            found[table] = {new.rpartition(".")[2] if each == key else each: value for each, value in own.items()}
    return found


def setting(assignment: str) -> dict[str, Any]:
    """The nested tables of one `key=value`: the value is TOML, or a plain string where it is not."""
    key, equals, text = assignment.partition("=")
    if not equals or not re.fullmatch(r"\s*[\w-]+(\.[\w-]+)*\s*", key):
        raise BadInput(f"--set {assignment}: expected table.key=value, as in --set train.lr=1e-3")
    if len(assignment.splitlines()) > 1:
        raise BadInput(f"--set {assignment!r}: a line break; give each key=value a --set of its own")
    try:
        parsed: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = text
    return nested(key.strip(), parsed)


def nested(key: str, value: Any) -> dict[str, Any]:
    """The tables of one dotted key."""
    found = value
    for part in reversed(key.split(".")):
        found = {part: found}
    return dict(found)


def settings(assignments: Iterable[str]) -> dict[str, Any]:
    """The nested tables of several of them together, the later ones winning."""
    merged: dict[str, Any] = {}
    for each in assignments:
        _merge(merged, setting(each))
    return merged


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, new in layer.items():
        if isinstance(new, Mapping):
            kept = into.get(key)
            table: dict[str, Any] = dict(kept) if isinstance(kept, Mapping) else {}
            if key in OWN and "name" in new and new["name"] != table.get("name"):  # the own fields of another do not carry over
                own = OWN[key]
                table = {} if own is None else {name: value for name, value in table.items() if name not in own}
            _merge(table, new)
            into[key] = table
        else:
            into[key] = new
