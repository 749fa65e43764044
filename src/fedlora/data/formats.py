"""From one file to a table: delimited text, JSON, Excel sheets and parquet.

A format of text tells no types, and is believed only in what stands there: every value is the text that was written, so 01 is no 1
and NA no missing value. JSON and Excel know numbers and truth values; those become the text that a csv would have. Only the columns
that are wanted are filled: the others are there by name, for messages.
"""

import codecs
import csv
import gzip
import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlora.config import SourceConfig
from fedlora.data.source import Part
from fedlora.errors import BadInput

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
DELIMITERS = {",": "','", ";": "';'", "\t": "tabs", "|": "'|'"}  # and what they are called
USUAL = {".tsv": "\t", ".txt": "\t"}  # of the others it is a comma
PACKED = ".gz"


def kind_of(path: Path) -> str:
    """What a file is by its name, in lower case: ".csv" of "Train.CSV" and of "train.csv.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = len(suffixes) == 2 and suffixes[1] == PACKED and suffixes[0] in TEXT
    return suffixes[0] if packed else path.suffix.lower()


def read_file(path: Path, config: SourceConfig) -> Part:
    """The rows of one file, whose columns `config` names. Raises BadInput: the file, the line where there is one, and the fault."""
    import pyarrow as pa

    kind = kind_of(path)
    if kind not in READERS:
        raise BadInput(f"{path}: unknown file type '{path.suffix}'; possible: {', '.join(READERS)} and {PACKED} of those of text")
    try:
        return READERS[kind](path, config)
    except (OSError, EOFError, zlib.error, UnicodeError, pa.ArrowException) as error:
        raise BadInput(f"{path}: cannot be read as {kind[1:]}: {one_line(error)}") from error


def one_line(error: object, limit: int = 200) -> str:
    """An error's message without line breaks, and not longer than a line: readers quote the rows that they choke on."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def wanted(config: SourceConfig) -> tuple[str, ...]:
    """The columns that a source is asked for."""
    return tuple(name for name in (config.text, config.label, config.column, *config.nested) if name is not None)


def _as_in(config: SourceConfig) -> str:
    """What a line of JSON looks like."""
    return '{"prompt": ..., "completion": ...}' if config.nested else f'{{"{config.text}": ..., "{config.label}": ...}}'


# ---- text --------------------------------------------------------------------------------------------------------------


def _text(path: Path, config: SourceConfig) -> tuple[str, tuple[str, ...]]:
    """The text of a file, unpacked and decoded, and notes: by its byte-order mark, as UTF-8, or else as cp1252."""
    raw = path.read_bytes()
    if path.suffix.lower() == PACKED:
        raw = gzip.decompress(raw)
    mark = next((mark for mark in BYTE_ORDER_MARKS if raw.startswith(mark)), None)
    encoding = config.encoding or (BYTE_ORDER_MARKS[mark] if mark else "utf-8")
    notes: tuple[str, ...] = ()
    if config.encoding is None and mark is None:
        if b"\0" in raw[:1000]:
            raise BadInput(f"{path}: it looks like UTF-16 without a byte-order mark: data.encoding = 'utf-16-le' or 'utf-16-be'")
        try:
            return raw.decode(), ()
        except UnicodeDecodeError:
            encoding = "cp1252"
            notes = (f"{path}: it is not UTF-8, so it is read as cp1252, as Windows writes; data.encoding names another",)
    try:
        return raw.decode(encoding).removeprefix("\ufeff"), notes
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        fault = f"neither UTF-8 nor {encoding}" if notes else f"not {encoding}"
        raise BadInput(f"{path}: line {line} is {fault}; data.encoding names what it is") from error


def _table(names: Sequence[str], columns: Iterable[Sequence[str | None]], rows: int, config: SourceConfig) -> Any:
    """A table of text, with the columns that are wanted filled."""
    import pyarrow as pa

    keep = wanted(config)
    arrays = [pa.array(c, pa.string()) if n in keep else pa.nulls(rows) for n, c in zip(names, columns, strict=True)]
    return pa.Table.from_arrays(arrays, names=list(names))


def _delimited(path: Path, config: SourceConfig) -> Part:
    text, notes = _text(path, config)
    csv.field_size_limit(2**31 - 1)  # Python's own limit is 128 kB a value
    found = _sniffed(text, config.delimiter or USUAL.get(kind_of(path), ","), wanted(config))
    delimiter, hint = config.delimiter or found, ""
    if delimiter != found:
        said = "\\t" if found == "\t" else found
        hint = f'it looks as if the columns are separated by {DELIMITERS[found]}: data.delimiter = "{said}"'
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    rows: list[list[str]] = []
    numbers: list[int] = []
    line = 1
    try:
        for row in reader:
            if not any(row):
                pass  # an empty line, or a row of a sheet in which nothing stands
            elif not names:
                names = row
            elif len(row) != len(names):
                raise BadInput(f"{path}: line {line} has {len(row)} values, but the header names {len(names)} columns")
            else:
                rows.append(row)
                numbers.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        unclosed = "unexpected end of data" in str(error)
        fault = "a quotation mark that is never closed" if unclosed else one_line(error)
        raise BadInput(f"{path}: line {line}: {fault}{hint and f'; {hint}'}") from error
    if not names:
        raise BadInput(f"{path}: the file is empty")
    if len(names) == 1 and not hint:
        hint = f"columns are separated by {', '.join(DELIMITERS.values())} or by what data.delimiter says"
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return Part(str(path), _table(names, columns, len(rows), config), numbers, "line", hint, notes)


def _sniffed(text: str, likely: str, columns: Sequence[str]) -> str:
    """The delimiter that separates a header: the one that finds most of the wanted columns, then the most columns, then the
    likely one."""
    start = text[:1_000_000]  # a header is not longer

    def header(delimiter: str) -> list[str]:
        return next((row for row in csv.reader(io.StringIO(start, newline=""), delimiter=delimiter) if any(row)), [])

    headers = {delimiter: header(delimiter) for delimiter in (likely, *DELIMITERS)}
    return max(headers, key=lambda delimiter: (len(set(columns) & set(headers[delimiter])), len(headers[delimiter])))


def _json(path: Path, config: SourceConfig) -> Part:
    """A list of objects, or an object on each line."""
    text, notes = _text(path, config)
    if text.lstrip()[:1] == "[":
        found, unit = _parsed(text, str(path), first=None), "row"
        items = list(enumerate(found, 1))
    else:
        # Not splitlines: JSON may hold the other line breaks of Unicode within a text.
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        items, unit = [(number, _parsed(line, str(path), number)) for number, line in lines], "line"
    if not items:
        raise BadInput(f"{path}: the file is empty")
    names: dict[str, None] = {}
    for number, item in items:
        if not isinstance(item, dict):
            raise BadInput(f"{path}: {unit} {number} is no object, as in {_as_in(config)}")
        names.update(dict.fromkeys(item))
    if not names:
        raise BadInput(f"{path}: its objects are empty; {_as_in(config)} is possible")
    keep = wanted(config)

    def written(item: Any, name: str, number: int) -> str | None:
        value = item.get(name)
        if name in config.nested and isinstance(value, list | dict):
            return json.dumps(value)
        return _scalar(value, f"{path}: column '{name}', {unit} {number}")

    columns = [[written(item, name, k) for k, item in items] if name in keep else [] for name in names]
    return Part(str(path), _table(list(names), columns, len(items), config), [k for k, _ in items], unit, notes=notes)


def _parsed(text: str, where: str, first: int | None) -> Any:
    """The value that JSON text stands for; `first` is its line in the file, where it is one line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: line {first or error.lineno} is not valid JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets in brackets
        raise BadInput(f"{where}: {f'line {first} ' if first else ''}cannot be read as JSON: {one_line(error)}") from error


def _scalar(value: Any, where: str) -> str | None:
    if isinstance(value, list | dict):
        raise BadInput(f"{where}: {'a list' if isinstance(value, list) else 'an object'}, not text")
    return value if value is None or isinstance(value, str) else json.dumps(value)


# ---- others ------------------------------------------------------------------------------------------------------------


def _excel(path: Path, config: SourceConfig) -> Part:
    """The first sheet of a workbook, values as they were last calculated."""
    try:
        import openpyxl
    except ImportError as error:
        raise BadInput(f"{path}: Excel files need the package openpyxl: pip install openpyxl; or save it as csv") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles and rules for input, which are not read
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            try:
                sheets = book.worksheets
                cells = [[_written(cell) for cell in row] for row in sheets[0].iter_rows(values_only=True)]
            finally:
                book.close()
    except Exception as error:  # what a damaged workbook raises has no common base
        raise BadInput(f"{path}: cannot be read as xlsx: {one_line(error)}") from error
    rows = [(number, row) for number, row in enumerate(cells, 1) if any(row)]
    if not rows:
        raise BadInput(f"{path}: sheet '{sheets[0].title}' is empty")
    (_, header), *rows = rows
    width = max(at + 1 for at, name in enumerate(header) if name)
    columns = [[row[at] if at < len(row) else None for _, row in rows] for at in range(width)]
    table = _table([name or "" for name in header[:width]], columns, len(rows), config)
    more = len(sheets) - 1
    notes = (f"{path}: of {more + 1} sheets the first, '{sheets[0].title}', is read",) if more else ()
    return Part(str(path), table, [number for number, _ in rows], notes=notes)


def _written(cell: Any) -> str | None:
    """A cell as Excel writes it to a csv."""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, datetime):
        return cell.isoformat(" ").removesuffix(" 00:00:00")
    return None if cell is None else str(cell)


def _parquet(path: Path, config: SourceConfig) -> Part:
    from pyarrow import parquet

    return Part(str(path), parquet.read_table(path))


TEXT: Mapping[str, Callable[[Path, SourceConfig], Part]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".txt": _delimited,
    ".jsonl": _json,
    ".json": _json,
}
READERS: Mapping[str, Callable[[Path, SourceConfig], Part]] = {**TEXT, ".xlsx": _excel, ".parquet": _parquet}
