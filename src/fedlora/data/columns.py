"""From the columns of a table to texts, owners, numbers and class indices, with an error that names file, column and row."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.dataset import Integers
from fedlora.data.source import Part
from fedlora.errors import BadInput, some, unknown

LARGEST = 1e140  # of numbers, so that a sum of their squares is one, too

Labels = tuple[int, ...] | tuple[str, ...]


def texts(part: Part, name: str) -> tuple[str, ...]:
    """The texts of a column; a missing value is an empty text. Raises BadInput when the column is missing or is no text."""
    column = find(part, name, "data.text")
    _require_text(part, name, column)
    return tuple(text or "" for text in _values(part, name, column))


def entries(part: Part, name: str, key: str) -> tuple[Any, ...]:
    """What stands in a column of texts or of lists: texts, integers as they are written, lists, and None where there is nothing.

    Raises:
        BadInput: the column is missing, or holds something else.
    """
    from pyarrow import types

    column = find(part, name, key)
    kind = column.type
    if types.is_integer(kind):
        column = column.cast("string")
    elif not (types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind)):
        _require_text(part, name, column)
    return tuple(_values(part, name, column))


def owners(part: Part, name: str) -> tuple[str, ...]:
    """Who each row belongs to. Raises BadInput when the column, or a value of it, is missing."""
    from pyarrow import types

    column = find(part, name, "data.column")
    if not types.is_integer(column.type):
        _require_text(part, name, column)
    values = _values(part, name, column)
    _require_all(part, name, values)
    return tuple(map(str, values))


def owners_of(part: Part, name: str | None, needed: bool) -> tuple[str, ...]:
    """The same, and nobody where no column is named, or a part that does not need it lacks it: such a test part tests everybody on
    all of it."""
    return owners(part, name) if name is not None and (needed or name in part.table.column_names) else ()


_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # Python would take 1_000, too


def labels(part: Part, name: str, integers: bool | None = None) -> Labels:
    """The labels of a column as they are written: text, or integers where every one of them is written as one (7, but not 07).

    Args:
        integers: what another part of the data set has, so that both are read alike; None to find out.

    Raises:
        BadInput: the column is missing, holds neither integers nor text, or lacks a value (the row is named).
    """
    from pyarrow import types

    column = find(part, name, "data.label")
    if types.is_floating(column.type) or types.is_decimal(column.type):
        _require_all(part, name, [None if x != x else x for x in _values(part, name, column)])  # pandas has no integer beside nan
        raise BadInput(f"{part.where}: column '{name}' holds fractional numbers; labels are integers or text")
    if types.is_boolean(column.type) or types.is_date(column.type):
        column = column.cast("string")
    if not types.is_integer(column.type):
        _require_text(part, name, column)
    values = _values(part, name, column)
    _require_all(part, name, values)
    written = [str(value) for value in values]
    if all(map(_is_number, written)) and any(map(_is_fractional, written)):
        raise BadInput(f"{part.where}: column '{name}' holds fractional numbers; labels are integers or text")
    if all(map(_INTEGER.fullmatch, written)) if integers is None else integers:
        return tuple(int(value) if _INTEGER.fullmatch(value) else value for value in written)  # type: ignore[return-value]
    return tuple(written)


def numbers(part: Part, name: str) -> NDArray[np.float64]:
    """The numbers of a column, (n,): integers, fractions, or text that is one, written with a decimal point. Raises BadInput when
    the column is missing, or holds another kind of values, or a value is no finite number (the row is named)."""
    from pyarrow import types

    column = find(part, name, "data.label")
    kind = column.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or _is_text(column)):
        raise BadInput(f"{part.where}: column '{name}' holds {kind}, not numbers")
    values = _values(part, name, column)
    _require_all(part, name, values)
    found = np.array([_number(value) for value in values], dtype=np.float64)
    for row in map(int, np.flatnonzero(~(abs(found) < LARGEST))[:1]):
        fault = (
            f"beyond {LARGEST:g}, and its square is no number; take another unit"
            if math.isfinite(found[row])
            else "no finite number"
        )
        raise BadInput(f"{part.where}: column '{name}', {part.place(row)}: {values[row]!r} is {fault}")
    return found


def _number(value: Any) -> float:
    """nan for what is none."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_fractional(text: str) -> bool:
    return any(mark in text for mark in ".eE")


def alike(names: Sequence[str]) -> list[str]:
    """Notes on classes whose names differ only in spaces or case: one class, written in several ways, most likely."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(name.split()).casefold(), []).append(f"'{name}'")
    told = [" and ".join(group) for group in groups.values() if len(group) > 1]
    return [f"classes that differ only in spaces or case: {some(told, shown=3)}; each is a class of its own"] if told else []


def class_names(values: Labels) -> tuple[str, ...]:
    """The different labels: integers in order of size, texts sorted."""
    integers = {value for value in values if isinstance(value, int)}
    return tuple(map(str, sorted(integers))) if integers else tuple(sorted(set(map(str, values))))


def encode(part: Part, column: str, values: Labels, names: Sequence[str], named: bool) -> Integers:
    """The class indices (n,) of labels.

    `named` says that the names were given beside the data, where an integer label is an index of `names`; otherwise an integer
    label is looked up by its name like any other.

    Raises:
        BadInput: a label that is not among the classes, and its row.
    """

    def place(row: int) -> str:
        return f"{part.where}: column '{column}', {part.place(row)}"

    index = {name: position for position, name in enumerate(names)}
    encoded = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        if named and isinstance(value, int):
            if not 0 <= value < len(names):
                raise BadInput(f"{place(row)}: label {value} has no name; the {len(names)} names are for 0 to {len(names) - 1}")
            encoded[row] = value
        elif str(value) in index:
            encoded[row] = index[str(value)]
        else:
            raise BadInput(f"{place(row)}: {unknown('label', str(value), names)}")
    return encoded


def find(part: Part, name: str, key: str) -> Any:
    """A column by its name; `key` is the configuration's key that names it."""
    have = part.table.column_names
    if have.count(name) != 1:
        fault = "no column" if name not in have else "more than one column"
        held = some([f"'{column}'" for column in have], shown=8) or "no columns"
        raise BadInput(f"{part.where}: {fault} '{name}'; it has {held}; {part.hint or f'{key} names the column'}")
    return part.table.column(name)


def _require_text(part: Part, name: str, column: Any) -> None:
    if not _is_text(column):
        raise BadInput(f"{part.where}: column '{name}' holds {column.type}, not text")


def _is_text(column: Any) -> bool:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind))


def _values(part: Part, name: str, column: Any) -> Any:
    try:
        return tuple(column.to_pylist())
    except UnicodeDecodeError as error:  # JSON is not checked when it is read
        raise BadInput(f"{part.where}: column '{name}' is not UTF-8: {error.reason}") from error


def _require_all(part: Part, name: str, values: Sequence[Any]) -> None:
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise BadInput(f"{part.where}: column '{name}' has no value in {part.place(row)}")
