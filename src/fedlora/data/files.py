"""Files and folders of csv, tsv, JSON lines and parquet."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fedlora.data.source import Part, Source
from fedlora.errors import BadInput

LABELS_FILE = "labels.json"


def read(path: Path, text_columns: Collection[str]) -> Source:
    """A file, or a folder with train.* and perhaps test.* and labels.json (a list of names, index = label).

    A folder may also hold its parts as `datasets` writes them: in `data/`, and in numbered pieces (train-00000-of-00002.parquet).
    `text_columns` are read as text even where every value of a csv looks like a number.

    Raises:
        BadInput: the file and why it cannot be read, or what the folder would need.
    """
    if not path.is_dir():
        return Source(path.stem, read_part([path], text_columns))
    train = _pieces(path, "train")
    if not train:
        wanted = ", ".join(f"train{suffix}" for suffix in READERS)
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise BadInput(f"{path}: no training file; a data folder has one of {wanted}, but this one holds {held}")
    test = _pieces(path, "test")
    return Source(
        path.resolve().name,
        read_part(train, text_columns),
        read_part(test, text_columns) if test else None,
        read_label_names(path / LABELS_FILE),
    )


def read_part(paths: list[Path], text_columns: Collection[str]) -> Part:
    """The rows of one file, or of the pieces of one part, in order. Raises BadInput: the file, and why it cannot be read."""
    import pyarrow as pa

    tables = [_read_table(path, text_columns) for path in paths]
    if len(tables) == 1:
        return Part(str(paths[0]), tables[0])
    where = f"{paths[0]} and {len(paths) - 1} more"
    try:
        return Part(where, pa.concat_tables(tables, promote_options="permissive"))
    except pa.ArrowException as error:
        raise BadInput(f"{where}: the pieces do not fit together: {one_line(error)}") from error


def read_label_names(path: Path) -> tuple[str, ...] | None:
    """The names in a labels.json, or None where there is no such file. Raises BadInput when it is no list of distinct names."""
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise BadInput(f'{path}: expected a list of distinct label names, as in ["no", "yes"]')
    return tuple(names)


def one_line(error: object, limit: int = 200) -> str:
    """An error's message without line breaks, and not longer than a line: readers quote the rows that they choke on."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pieces(folder: Path, part: str) -> list[Path]:
    name = re.compile(rf"{part}(-\d+-of-\d+(-\w+)?)?\.\w+")
    found = [
        file
        for place in (folder, folder / "data")
        if place.is_dir()
        for file in sorted(place.iterdir())
        if name.fullmatch(file.name) and file.suffix.lower() in READERS
    ]
    kinds = {(file.parent, file.suffix, "-" in file.stem) for file in found}
    if len(kinds) > 1:
        raise BadInput(f"{folder}: more than one {part} file: {', '.join(str(file.relative_to(folder)) for file in found)}")
    return found


def _read_table(path: Path, text_columns: Collection[str]) -> Any:
    import pyarrow as pa

    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path}: unknown file type '{path.suffix}'; possible: {', '.join(READERS)}")
    try:
        return reader(path, text_columns)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise BadInput(f"{path}: cannot be read as {path.suffix[1:].lower()}: {one_line(error)}") from error


def _whole(path: Path) -> int:
    """A block of the readers that holds the whole file, as far as they can count: a text may be longer than the usual block,
    and types are inferred from the first one."""
    return min(path.stat().st_size + 1, 2**31 - 1)


def _delimited(delimiter: str) -> Callable[[Path, Collection[str]], Any]:
    def read_delimited(path: Path, text_columns: Collection[str]) -> Any:
        import pyarrow as pa
        from pyarrow import csv

        return csv.read_csv(
            path,
            read_options=csv.ReadOptions(block_size=_whole(path)),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types={column: pa.string() for column in text_columns}),
        )

    return read_delimited


def _json_lines(path: Path, text_columns: Collection[str]) -> Any:
    from pyarrow import json as lines

    return lines.read_json(path, read_options=lines.ReadOptions(block_size=_whole(path)))


def _parquet(path: Path, text_columns: Collection[str]) -> Any:
    from pyarrow import parquet

    return parquet.read_table(path)


READERS: Mapping[str, Callable[[Path, Collection[str]], Any]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}
