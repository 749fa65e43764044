"""Data that is at hand in Python: tables of any kind, as parts of a data set or by client. A run keeps them in its folder.

FOLDER/train.parquet, test.parquet, validation.parquet      the columns that are used; of the others, the names
FOLDER/labels.json                                          what integer labels mean, where that is known
FOLDER/owners.json                                          of data by client: the clients, in order
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.data.files import LABELS_FILE, OWNER, OWNERS_FILE, VALIDATION
from fedlora.data.formats import one_line
from fedlora.errors import BadInput, some

KEPT = "data"  # the folder of it in a run's
RUN = "run:"  # before its name in a configuration
GIVEN = ".given"  # the folder of it, and of a model, in a comparison's
PARTS = {"train": "train", "test": "test", **dict.fromkeys(VALIDATION, "validation")}  # what parts may be called


@dataclass(frozen=True)
class Data:
    """A data set of tables: pandas or polars frames, `datasets.Dataset`, `pyarrow.Table`, a mapping of columns, or a list of rows.

    Attributes:
        train: the training part.
        test, validation: the others, where there are such.
        label_names: what integer labels mean, index = label.
        name: what it is called.
        column: the column that names the owner of each row, where it was made of data by client.

    Raises:
        BadInput: there is no training part, or the name cannot be that of a folder.
    """

    train: Any
    test: Any = None
    validation: Any = None
    label_names: Sequence[str] | None = None
    name: str = "data"
    column: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.train is None:
            raise BadInput("data: there is no train part")
        if not isinstance(self.name, str) or not self.name.strip(" .") or set(self.name) & set("/\\\0"):
            raise BadInput(f"data: name = {self.name!r}; a name without slashes is possible, such as 'tickets'")

    @classmethod
    def by_client(cls, clients: "Mapping[Any, Any] | Sequence[Any]", name: str = "data") -> "Data":
        """The data sets of clients, by name, or numbered: each a table to train on, or a `Data` with a test part of its own, which
        all of them have or none has. Clients are numbered in the order in which they stand here."""
        named = clients.items() if isinstance(clients, Mapping) else ((f"client {k}", each) for k, each in enumerate(clients))
        parts: dict[str, Data] = {}
        for key, each in named:
            if str(key) in parts:
                raise BadInput(f"data: two clients are called '{key}'")
            parts[str(key)] = each if isinstance(each, Data) else cls(each)
        if not parts:
            raise BadInput("data: no client has any")
        labels = {None if each.label_names is None else tuple(each.label_names) for each in parts.values()}
        if len(labels) > 1:
            raise BadInput("data: the clients' label_names differ; they must be the same, in the same order")

        def owned(part: str) -> "_Owned | None":
            found = {owner: getattr(each, part) for owner, each in parts.items() if getattr(each, part) is not None}
            if found and len(found) < len(parts):
                raise BadInput(f"data: {len(found)} of {len(parts)} clients have a {part} part; all must have one, or none")
            return _Owned(found) if found else None

        return cls(owned("train"), owned("test"), owned("validation"), labels.pop(), name, OWNER)


@dataclass(frozen=True)
class _Owned:
    """A part of data by client: owner -> table."""

    tables: Mapping[str, Any]


def given(data: Any) -> "str | list[str] | Data":
    """What a user gave as data: the sources that a configuration can name, or tables.

    Raises:
        BadInput: tables some of which are parts of a data set by their names, and others are not.
    """
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, Data):
        return data
    if isinstance(data, Sequence) and data and all(isinstance(each, str | Path) for each in data):
        return [str(each) for each in data]
    several = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, Sequence) else []
    if several and all(map(is_table, several)):
        return _parts(data) if isinstance(data, Mapping) and any(_part(key) for key in data) else Data.by_client(data)
    return Data(data)


def _part(key: Any) -> str | None:
    return PARTS.get(key.lower()) if isinstance(key, str) else None


def _parts(data: Mapping[str, Any]) -> Data:
    """A data set whose parts are called as such."""
    strange = [str(key) for key in data if _part(key) is None]
    if strange:
        raise BadInput(
            f"data: {some(strange, 3)}: no part of a data set, as train, test and validation are; leave it out, or give clients, "
            "none of which is called so"
        )
    found = {PARTS[key.lower()]: each for key, each in data.items()}
    if len(found) < len(data) or "train" not in found:
        raise BadInput(f"data: {', '.join(data)}: one train part is needed, and of test and validation at most one each")
    return Data(**found)


# ---- in a folder -------------------------------------------------------------------------------------------------------


def write(data: Data, folder: Path, label: str, columns: frozenset[str] | None) -> None:
    """The tables as files that `data.source` can name. Labels of a `datasets.Dataset` are told by their names, so that parts and
    clients may number them differently.

    Args:
        label: the column of labels.
        columns: those that may be used; None keeps all.

    Raises:
        BadInput: what is no table, or cannot be written, or clients' tables that do not fit together.
    """
    from pyarrow import ArrowException, parquet

    parts = {part: rows for part in ("train", "test", "validation") if (rows := getattr(data, part)) is not None}
    pieces = [rows for part in parts.values() for rows in (part.tables.values() if isinstance(part, _Owned) else [part])]
    known = [own for rows in pieces if (own := _class_names(rows, label)) is not None]
    names = list(dict.fromkeys(name for own in known for name in own)) if data.label_names is None else list(data.label_names)
    if data.label_names is not None and any(own != known[0] for own in known):
        raise BadInput("data: the class names of its tables differ, so label_names cannot say what their labels mean; leave it out")

    def told(rows: Any, where: str) -> Any:
        found, own = table(rows, where, columns), _class_names(rows, label)
        return found if own is None or data.label_names is not None else _renumbered(found, label, [names.index(x) for x in own])

    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        if isinstance(rows, _Owned):
            made = _together({owner: told(each, f"data of {owner} ({part})") for owner, each in rows.tables.items()}, part, columns)
        else:
            made = told(rows, f"data ({part})")
        try:
            parquet.write_table(made, folder / f"{part}.parquet")
        except ArrowException as error:
            raise BadInput(f"data ({part}): {one_line(error)}") from error
    if names:
        (folder / LABELS_FILE).write_text(json.dumps(names))
    if isinstance(data.train, _Owned):
        (folder / OWNERS_FILE).write_text(json.dumps(list(data.train.tables)))


def same(kept: Path, fresh: Path) -> bool:
    """Whether what `write` has left in a folder is what it leaves in another now: by content, for an earlier version, or another
    kind of table, writes the same in other types and with more columns."""
    from pyarrow import parquet, types

    for part in ("train", "test", "validation"):
        files = [place / f"{part}.parquet" for place in (kept, fresh)]
        if not all(file.is_file() for file in files):
            if any(file.is_file() for file in files):
                return False
            continue
        old, new = map(parquet.read_table, files)
        filled = [each.name for each in new.schema if not types.is_null(each.type)]
        if old.num_rows != new.num_rows or any(
            name not in old.column_names or old.column(name).to_pylist() != new.column(name).to_pylist() for name in filled
        ):
            return False
    labels, owners = ([_read(place / name) for place in (kept, fresh)] for name in (LABELS_FILE, OWNERS_FILE))
    return labels[0] == labels[1] and owners[0] in (None, owners[1])  # earlier versions sorted the owners, and kept none


def _read(file: Path) -> Any:
    return json.loads(file.read_bytes()) if file.is_file() else None


def _class_names(rows: Any, label: str) -> list[str] | None:
    """What a `datasets.Dataset` says that integer labels mean."""
    names = getattr((getattr(rows, "features", None) or {}).get(label), "names", None)
    return None if names is None else list(names)


def _renumbered(found: Any, label: str, numbers: Sequence[int]) -> Any:
    """A table whose label k is number k of these; a label that has none is -1."""
    import pyarrow as pa

    if label not in found.column_names or list(numbers) == list(range(len(numbers))):
        return found
    values = [
        x if x is None or isinstance(x, str) else numbers[x] if 0 <= x < len(numbers) else -1
        for x in found.column(label).to_pylist()
    ]
    return found.set_column(found.column_names.index(label), label, pa.array(values))


def _together(tables: Mapping[str, Any], part: str, columns: Collection[str] | None) -> Any:
    """One table of all clients', with a column that names whose each row is."""
    import pyarrow as pa

    held = dict.fromkeys(name for each in tables.values() for name in each.column_names if columns is None or name in columns)
    marked = []
    for owner, each in tables.items():
        if OWNER in each.column_names:
            raise BadInput(f"data of {owner}: it has a column '{OWNER}', which data by client gets here; rename it")
        if part == "train" and not each.num_rows:
            raise BadInput(f"data of {owner} ({part}): no rows")
        lost = [f"'{name}'" for name in held if name not in each.column_names]
        if lost:
            raise BadInput(f"data of {owner} ({part}): no column {some(lost, 3)}, which others have")
        marked.append(each.append_column(OWNER, pa.array([owner] * each.num_rows, pa.large_string())))
    try:
        return pa.concat_tables(marked, promote_options="permissive")
    except pa.ArrowException as error:
        raise BadInput(f"data: the clients' tables do not fit together: {one_line(error)}") from error


# ---- tables ------------------------------------------------------------------------------------------------------------


def is_table(x: Any) -> bool:
    """Whether something is a table, not a column or a row of one."""
    if isinstance(x, Mapping):  # of columns, not of the values of a row
        return all(
            (isinstance(each, Sequence) and not isinstance(each, str | bytes)) or hasattr(each, "__array__") for each in x.values()
        )
    if isinstance(x, Sequence):
        return bool(x) and all(isinstance(row, Mapping) for row in x)
    return isinstance(x, Data) or any(hasattr(x, name) for name in ("columns", "column_names", "features"))


def table(rows: Any, where: str, columns: Collection[str] | None = None) -> Any:
    """The `pyarrow.Table` of a table of any kind, texts as `large_string` and nothing as a dictionary.

    Args:
        columns: those that are filled; the others are there by name, without values. None for all.

    Raises:
        BadInput: it is none, or a column of these cannot be one.
    """
    import pyarrow as pa

    try:
        found = _arrow(rows, columns)
        plain = found and [_plain(found.column(k)) for k in range(found.num_columns)]
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise BadInput(f"{where}: not a table: {one_line(error)}") from error
    if found is not None:
        return pa.Table.from_arrays(plain, names=found.column_names) if plain else found
    if isinstance(rows, Sequence) and not isinstance(rows, str) and not rows:
        raise BadInput(f"{where}: no rows")
    raise BadInput(
        f"{where}: {type(rows).__name__} is no table; possible: a data frame, datasets.Dataset, pyarrow.Table, a mapping of "
        "columns, or a list of rows; a name, a file or a folder stands alone, as data=..."
    )


def _arrow(rows: Any, columns: Collection[str] | None) -> Any:
    """The same in Arrow's own types; None where it is none. Raises what Arrow raises."""
    import pyarrow as pa

    def wanted(name: str) -> bool:
        return columns is None or name in columns

    if isinstance(rows, pa.Table):
        return _emptied(rows, columns)
    if hasattr(rows, "with_format") and hasattr(rows, "features"):  # datasets.Dataset; one that is iterable has no table
        found = rows.with_format("arrow")[:]
        return _emptied(found, columns) if isinstance(found, pa.Table) else None
    if isinstance(rows, Mapping):
        text = next((name for name, x in rows.items() if isinstance(x, str | bytes)), None)
        if text is not None:
            raise ValueError(f"column '{text}' is one text, not a list of values; files by client have to be read before")
        return pa.table({str(name): _column(str(name), x) if wanted(str(name)) else pa.nulls(len(x)) for name, x in rows.items()})
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        keys = dict.fromkeys(key for row in rows for key in row)
        return _arrow({key: [row.get(key) if wanted(str(key)) else None for row in rows] for key in keys}, columns)
    if hasattr(rows, "columns") and hasattr(rows, "__getitem__"):  # a data frame
        names = [name for name in rows.columns if wanted(str(name))]
        own, others = rows[names], [str(name) for name in rows.columns if not wanted(str(name))]
        made = pa.Table.from_pandas(own, preserve_index=False) if hasattr(own, "iloc") else pa.table(own)
        empty = pa.nulls(len(rows))
        if not names:
            return pa.table([empty] * len(others), names=others)
        for name in others:
            made = made.append_column(name, empty)
        return made
    return _emptied(pa.table(rows), columns) if hasattr(rows, "__arrow_c_stream__") else None


def _column(name: str, values: Any) -> Any:
    """Arrow's column of anything that is one."""
    import pyarrow as pa

    try:
        return pa.table({name: values}).column(0)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"column '{name}': {error}") from error


def _emptied(found: Any, columns: Collection[str] | None) -> Any:
    """A table with values in these columns alone."""
    import pyarrow as pa

    names = found.column_names
    kept = [x if columns is None or n in columns else pa.nulls(len(x)) for n, x in zip(names, found.columns, strict=True)]
    return pa.Table.from_arrays(kept, names=names) if kept else found


def _plain(column: Any) -> Any:
    """A column in types that every other kind of table has too, and parquet can hold."""
    import pyarrow as pa

    kind = _plain_type(column.type)
    return column if kind == column.type else pa.chunked_array([pa.array(column.to_pylist(), kind)])


def _plain_type(kind: Any) -> Any:
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if types.is_string(kind) or types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.large_list(_plain_type(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([each.with_type(_plain_type(each.type)) for each in kind])
    return kind
