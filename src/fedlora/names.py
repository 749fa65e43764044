"""What data and models are called in titles, tables and model cards, never by the folders that they lie in; and how many."""

import os
from collections.abc import Iterable
from pathlib import Path

IN_MEMORY = ("run:", "given:")  # before the names of data and of models that were given in Python
FILES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz", ".xlsx", ".txt", ".gguf"}


def is_local(source: str) -> bool:
    """Whether a source is a file or folder, here or on the machine where it was written down; else it is a catalogue name or a
    Hub id, which has one slash at most."""
    looks = source.startswith((".", "~")) or os.path.isabs(source) or source.count("/") > 1 or Path(source).suffix.lower() in FILES
    return looks or os.path.exists(source)


def short(source: str) -> str:
    """A catalogue name or Hub id as it is; a file or folder by its last name; what was given in Python by the name it has there."""
    if source.startswith(IN_MEMORY):
        return source.split(":")[1]
    return Path(source).name or source if is_local(source) else source


def counted(count: int, what: str) -> str:
    """So many of something, in words: "1 round", "1,200 rounds"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def part_of(count: int, total: int, what: str) -> str:
    """The beginning of a sentence on some of what there is: "1 of 63 texts is", "2 of 63 texts are"."""
    return f"{count:,} of {counted(total, what)} {'is' if count == 1 else 'are'}"


def told_apart(sources: Iterable[str]) -> dict[str, str]:
    """Source -> its short name, longer by the folders that it takes to tell it from the others."""
    known = list(dict.fromkeys(sources))
    out = {source: short(source) for source in known}
    parts = 2
    while len(set(out.values())) < len(known) and parts <= max(len(Path(source).parts) for source in known):
        taken = list(out.values())
        out |= {
            source: "/".join(Path(source).parts[-parts:]) for source in known if is_local(source) and taken.count(out[source]) > 1
        }
        parts += 1
    return out
