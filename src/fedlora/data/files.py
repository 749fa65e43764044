"""Files and folders of data: which file is which part of a data set."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from fedlora.config import SourceConfig
from fedlora.data.formats import READERS, kind_of, one_line, read_file
from fedlora.data.source import Part, Source
from fedlora.errors import BadInput

LABELS_FILE = "labels.json"
OWNERS_FILE = "owners.json"  # of data by client, which `data.given` writes: the clients in order
OWNER = "client"  # the column that names whose row it is there
VALIDATION = ("validation", "valid", "val", "dev")


def read(path: Path, config: SourceConfig) -> Source:
    """A file, or a folder with train.* and perhaps test.*, validation.* and labels.json (a list of names, index = label).

    A folder may also hold its parts as `datasets` writes them: in `data/`, and in numbered pieces (train-00000-of-00002.parquet).
    Upper and lower case are one in the names of parts.

    Raises:
        BadInput: the file and why it cannot be read, or what the folder would need.
    """
    if not path.is_dir():
        return Source(path.name[: path.name.lower().rfind(kind_of(path))], read_part([path], config))
    train = _pieces(path, "train")
    if not train:
        wanted = ", ".join(f"train{suffix}" for suffix in READERS)
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise BadInput(f"{path}: no training file; a data folder has one of {wanted}, but this one holds {held}")
    pieces = train, _pieces(path, "test"), _pieces(path, *VALIDATION)
    parts = [read_part(each, config) if each else None for each in pieces]
    owners = read_names(path / OWNERS_FILE) if config.column == OWNER else None
    if owners is not None:
        parts = [part and _counted_by_owner(part) for part in parts]
    assert parts[0] is not None
    names = read_names(path / LABELS_FILE)
    return Source(path.resolve().name, parts[0], parts[1], names, validation=parts[2], owners=owners or ())


def _counted_by_owner(part: Part) -> Part:
    """A part whose rows are counted in the tables that it was made of, each of one owner."""
    counts: Counter[str] = Counter()
    numbers = []
    for owner in part.table.column(OWNER).to_pylist():
        counts[owner] += 1
        numbers.append(f"{counts[owner]} of {owner}")
    return replace(part, numbers=numbers)


def read_part(paths: list[Path], config: SourceConfig) -> Part:
    """The rows of one file, or of the pieces of one part, in order. Raises BadInput: the file, and why it cannot be read."""
    import pyarrow as pa

    parts = [read_file(path, config) for path in paths]
    if len(parts) == 1:
        return parts[0]
    where = f"{paths[0]} and {len(paths) - 1} more"
    try:
        table = pa.concat_tables([part.table for part in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise BadInput(f"{where}: the pieces do not fit together: {one_line(error)}") from error
    return Part(where, table, hint=parts[0].hint, notes=tuple(note for part in parts for note in part.notes))


def read_names(path: Path) -> tuple[str, ...] | None:
    """The names in such a file, or None where there is none. Raises BadInput when it is no list of distinct names."""
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise BadInput(f'{path}: expected a list of distinct names, as in ["no", "yes"]')
    return tuple(names)


def _pieces(folder: Path, *names: str) -> list[Path]:
    """The file of a part, or its numbered pieces; `names` are what the part may be called."""
    name = re.compile(rf"({'|'.join(names)})(-\d+-of-\d+(-\w+)?)?(\.\w+)(\.gz)?", re.IGNORECASE)
    found = [
        (file, match)
        for place in (folder, folder / "data")
        if place.is_dir()
        for file in sorted(place.iterdir())
        if (match := name.fullmatch(file.name)) and kind_of(file) in READERS
    ]
    # Numbered pieces are one part; beside them, or beside a whole file, there may be no other.
    kinds = {(file.parent, match[1], match[4], match[5], "" if match[2] else file.name) for file, match in found}
    if len(kinds) > 1:
        listed = ", ".join(str(file.relative_to(folder)) for file, _ in found)
        raise BadInput(f"{folder}: more than one {names[0]} file: {listed}")
    return [file for file, _ in found]
