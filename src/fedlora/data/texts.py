"""Texts that have no labels yet: a file of them, or lines as they come."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedlora.config import SourceConfig
from fedlora.data import columns
from fedlora.data.formats import READERS, kind_of, read_file
from fedlora.errors import BadInput, brief


def read(path: Path, source: SourceConfig) -> Iterator[str]:
    """The texts of a file: a line each of a .txt; of what else `formats` reads, the column of texts that `source` names.

    Raises:
        BadInput: the file, and why it cannot be read.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder; a file of texts is needed")
    kind = kind_of(path)
    if kind not in (".txt", *READERS):
        raise BadInput(f"{path}: unknown file type '{path.suffix}'; possible: .txt, {', '.join(READERS)}")
    if kind != ".txt":
        return iter(columns.texts(read_file(path, source), source.text))
    try:
        return lines(path.read_bytes().splitlines(), str(path))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error


def lines(raw: Iterable[bytes], where: str) -> Iterator[str]:
    """The texts of lines in UTF-8, without what ends a line; a blank line is a text. BadInput names the line that is none."""
    for number, line in enumerate(raw, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: line {number} is not UTF-8: {error.reason}") from error


def arguments(texts: Iterable[Any]) -> Iterator[str]:
    """The texts of a command line or a list. BadInput names the one that is none, or no UTF-8."""
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise BadInput(f"text {number} is none, but {brief(text)}")
        try:
            text.encode()  # what the shell gave and is none stands here as surrogates
        except UnicodeEncodeError as error:
            raise BadInput(f"text {number} is not UTF-8") from error
        yield text
