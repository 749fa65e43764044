"""Data that is at hand in Python: tables of any kind, as parts of a data set or by client. A run keeps them in its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Any

from fedlora.data.formats import one_line
from fedlora.errors import BadInput

KEPT = "data"  # the folder of it in a run's
RUN = "run:"  # before its name in a configuration
OWNER = "client"  # the column that names whose row it is, of data by client


@dataclass(frozen=True)
class Data:
    """A data set of tables: pandas or polars frames, `datasets.Dataset`, `pyarrow.Table`, a mapping of columns, or a list of rows.

    Attributes:
        train: the training part.
        test, validation: the others, where there are such.
        label_names: what integer labels mean, index = label.
        name: what it is called.
        column: the column that names the owner of each row, where it was made of data by client.
    """

    train: Any
    test: Any = None
    validation: Any = None
    label_names: Sequence[str] | None = None
    name: str = "data"
    column: str | None = field(default=None, repr=False)

    @classmethod
    def by_client(cls, clients: "Mapping[str, Any] | Sequence[Any]", name: str = "data") -> "Data":
        """The data sets of clients, by name, or numbered: each a table to train on, or a `Data` with a test part of its own, which
        all of them have or none has."""
        owned = clients if isinstance(clients, Mapping) else {f"client {k}": each for k, each in enumerate(clients)}
        if not owned:
            raise BadInput("data: no client has any")
        parts = {owner: each if isinstance(each, Data) else cls(each) for owner, each in owned.items()}
        named = {None if each.label_names is None else tuple(each.label_names) for each in parts.values()}
        if len(named) > 1:
            raise BadInput("data: the clients' label_names differ; they must be the same, in the same order")

        def joined(part: str) -> Any:
            found = {owner: getattr(each, part) for owner, each in parts.items() if getattr(each, part) is not None}
            if found and len(found) < len(parts):
                raise BadInput(f"data: {len(found)} of {len(parts)} clients have a {part} part; all must have one, or none")
            return _together({owner: table(each, f"data of {owner} ({part})") for owner, each in found.items()}) if found else None

        return cls(joined("train"), joined("test"), joined("validation"), named.pop(), name, OWNER)


def given(data: Any) -> "str | list[str] | Data":
    """What a user gave as data: the sources that a configuration can name, or tables."""
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, Data):
        return data
    if isinstance(data, Sequence) and data and all(isinstance(each, str | Path) for each in data):
        return [str(each) for each in data]
    if isinstance(data, Mapping) and "train" in data and _is_table(data["train"]):
        return Data(data["train"], data.get("test"), data.get("validation"))
    several = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, Sequence) else []
    if several and all(map(_is_table, several)):
        return Data.by_client(data)
    return Data(data)


def write(data: Data, folder: Path, label: str) -> None:
    """The tables as files that `data.source` can name. BadInput: what is no table, or cannot be written.

    Args:
        label: the column of labels, whose names a `datasets.Dataset` may know.
    """
    from pyarrow import ArrowException, parquet

    folder.mkdir(parents=True)
    for part in ("train", "test", "validation"):
        if getattr(data, part) is not None:
            try:
                parquet.write_table(table(getattr(data, part), f"data ({part})"), folder / f"{part}.parquet")
            except ArrowException as error:
                raise BadInput(f"data ({part}): {one_line(error)}") from error
    names = data.label_names
    if names is None:
        names = getattr(getattr(data.train, "features", {}).get(label), "names", None)
    if names is not None:
        (folder / "labels.json").write_text(dumps(list(names)))


def table(rows: Any, where: str) -> Any:
    """The `pyarrow.Table` of a table of any kind. BadInput when it is none."""
    import pyarrow as pa

    try:
        if isinstance(rows, pa.Table):
            return rows
        if hasattr(rows, "with_format") and hasattr(rows, "features"):  # datasets.Dataset
            return rows.with_format("arrow")[:]
        if hasattr(rows, "__arrow_c_stream__"):
            return pa.table(rows)
        if isinstance(rows, Mapping):
            return pa.table(dict(rows))
        if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
            return pa.Table.from_pylist(list(rows))
        if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # an older data frame
            return pa.Table.from_pandas(rows, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise BadInput(f"{where}: not a table: {one_line(error)}") from error
    raise BadInput(
        f"{where}: {type(rows).__name__} is no table; possible: a data frame, datasets.Dataset, pyarrow.Table, a mapping of "
        "columns, a list of rows, or the name of a data set, a file or a folder"
    )


def _is_table(x: Any) -> bool:
    """Whether something is a table, not a column or a row of one."""
    if isinstance(x, Mapping):  # of columns, not of the values of a row
        return all(
            (isinstance(each, Sequence) and not isinstance(each, str | bytes)) or hasattr(each, "__array__") for each in x.values()
        )
    if isinstance(x, Sequence):
        return bool(x) and all(isinstance(row, Mapping) for row in x)
    return isinstance(x, Data) or any(hasattr(x, name) for name in ("columns", "column_names", "features"))


def _together(tables: Mapping[str, Any]) -> Any:
    """One table of all, with a column that names whose each row is."""
    import pyarrow as pa

    marked = []
    for owner, each in tables.items():
        if OWNER in each.column_names:
            raise BadInput(f"data of {owner}: it has a column '{OWNER}', which data by client gets here; rename it")
        marked.append(each.append_column(OWNER, pa.array([owner] * each.num_rows, pa.string())))
    try:
        return pa.concat_tables(marked, promote_options="permissive")
    except pa.ArrowException as error:
        raise BadInput(f"data: the clients' tables do not fit together: {one_line(error)}") from error
