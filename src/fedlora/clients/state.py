"""What clients keep between rounds, on disk: a process that plays thousands of personal clients has room for those of one wave.

    kept-00005.fed     what the clients of round 5 keep, one after the other; clients of earlier rounds stay in the earlier files

A round's file is written under another name as its clients finish, flushed to disk and renamed when the round is over.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, BinaryIO, NamedTuple
from weakref import finalize

from fedlora import wire
from fedlora.disk import digest
from fedlora.types import Tensors


@dataclass(frozen=True)
class ClientState:
    """What one client keeps between rounds: the method's part, its own head where heads are personal, the transforms' part."""

    held: Any = None
    head: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)  # what the transforms of its changes lost so far

    @property
    def is_empty(self) -> bool:
        return self.held is None and not self.head and not self.memory


class Location(NamedTuple):
    """Where the bytes of one client's ClientState lie, and their digest."""

    file: str
    start: int
    length: int
    digest: str


class StateStore:
    """What every client keeps that was ever accepted and has something to keep.

    Attributes:
        places: client -> where.
    """

    def __init__(self, folder: Path | None, classes: Sequence[type[Any]], places: Mapping[int, Location] | None = None) -> None:
        """`folder` is a temporary one where it is None; `classes` are those that what is kept may hold."""
        self.folder = Path(mkdtemp()) if folder is None else folder
        if folder is None:
            finalize(self, rmtree, self.folder, ignore_errors=True)
        self.places: dict[int, Location] = dict(places or {})
        self._classes: list[type[Any]] = [ClientState, *classes]
        self._fresh: dict[int, Location] = {}
        self._file: BinaryIO | None = None
        self._name = ""

    def get(self, id: int) -> ClientState | None:
        """What a client keeps, or None. ValueError when it is damaged."""
        return read(self.folder, self.places[id], self._classes) if id in self.places else None

    def put(self, round: int, id: int, kept: ClientState) -> None:
        """What a client keeps if its reply of this round is accepted."""
        if kept.is_empty:
            return
        if self._file is None:
            self.folder.mkdir(exist_ok=True)
            self._name = f"kept-{round:05d}.fed"
            self._file = (self.folder / f"{self._name}.part").open("wb")
        data = wire.encode(kept)
        self._fresh[id] = Location(self._name, self._file.tell(), len(data), digest(data))
        self._file.write(data)

    def commit(self, accepted: Collection[int]) -> None:
        """The round is over."""
        if self._file is not None:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.folder / f"{self._name}.part", self.folder / self._name)
        self.places |= {id: place for id, place in self._fresh.items() if id in accepted}
        self._file, self._fresh = None, {}


def read(folder: Path, place: Location, classes: Sequence[type[Any]]) -> ClientState:
    """What lies at a place. ValueError when it is damaged or gone."""
    try:
        with open(folder / place.file, "rb") as file:
            file.seek(place.start)
            data = file.read(place.length)
    except OSError as error:
        raise ValueError(f"{place.file}: {error.strerror}") from error
    if digest(data) != place.digest:
        raise ValueError(f"{place.file} is damaged")
    kept: ClientState = wire.decode(data, classes)
    return kept
