"""Inputs that are at hand in Python: a list, a table, or one alone."""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from fedlora.data.given import is_table, table
from fedlora.errors import BadInput, some
from fedlora.runs.predict import Predictor


def listed(inputs: Any, model: Predictor) -> list[Any]:
    """The inputs that somebody means: those of a list, in the column of a table, or one alone."""
    size: tuple[int, ...] = getattr(inputs, "shape", ())
    pixels = str(getattr(inputs, "dtype", "")) == "uint8" and (len(size) == 2 or (len(size) == 3 and size[2] in (3, 4)))
    if isinstance(inputs, str | bytes | bytearray | PathLike) or hasattr(inputs, "convert") or pixels:  # PIL's have the latter
        return [inputs]
    if is_table(inputs):
        prompts = model.schema.prompts
        name = prompts[model.domain or 0][1] if prompts else getattr(model.choice.source, model.task.INPUT, "")
        found = table(inputs, "inputs", (name,))
        if name not in found.column_names:
            raise BadInput(f"inputs: no column '{name}', as the run's data had; it has {some(found.column_names, 8)}")
        return list(found.column(name).to_pylist())
    if isinstance(inputs, Mapping) or not isinstance(inputs, Iterable):
        raise BadInput(f"inputs: {type(inputs).__name__} is no list of {model.task.INPUT}s, nor a table with a column of them")
    return list(inputs)
