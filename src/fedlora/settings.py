"""Making a frozen dataclass of settings, a method or a transform, from what a configuration says."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from fedlora.errors import BadInput, unknown


def build(kind: type[Any], settings: Mapping[str, Any], what: str, prefix: str, owner: str = "") -> Any:
    """`kind` with these settings, each converted to its field's type.

    Args:
        what: what a field is called in the error for one that does not exist ("config key").
        prefix: what stands before its name there ("method.").
        owner: what stands before both in the error for a value ("transform ").

    Raises:
        BadInput: names a field that `kind` does not have, lacks, or cannot take.
    """
    from pydantic import TypeAdapter, ValidationError

    known = [f"{prefix}{f.name}" for f in fields(kind)]
    for key in settings:
        if f"{prefix}{key}" not in known:
            if not known:
                raise BadInput(f"unknown {what} '{prefix}{key}'; {kind.__name__} has no settings")
            raise unknown(what, f"{prefix}{key}", known)
    hints = get_type_hints(kind)
    for key, value in settings.items():
        try:
            refuse_infinite(value)
            if bool not in (hints[key], *get_args(hints[key])):
                refuse_boolean(value)
        except ValueError as error:
            raise BadInput(f"{owner}{prefix}{key} = {value!r}: {error}") from error
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{owner}{prefix}{'.'.join(map(str, first['loc']))}".rstrip(".")
        if first["type"] == "missing":
            raise BadInput(f"{where} is missing") from error
        raise BadInput(f"{where} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}") from error


def refuse_boolean(value: Any) -> None:
    """ValueError for true and false, alone or in a list, where they would pass for 1 and 0."""
    if isinstance(value, bool) or (isinstance(value, list) and any(isinstance(each, bool) for each in value)):
        raise ValueError("true and false are no numbers and no names")


def refuse_infinite(value: Any) -> None:
    """ValueError for inf and nan, alone or in a list."""
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, float)]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a finite number is needed")
