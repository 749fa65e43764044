"""Making a frozen dataclass of settings, a method or a transform, from what a configuration says."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

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
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{owner}{prefix}{'.'.join(map(str, first['loc']))}".rstrip(".")
        if first["type"] == "missing":
            raise BadInput(f"{where} is missing") from error
        raise BadInput(f"{where} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}") from error
