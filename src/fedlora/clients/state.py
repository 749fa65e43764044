"""What clients keep between rounds, on disk, by client and round: any of the last rounds can be gone on from.

    states/round-00005-0.states     what the clients that worker 0 played in round 5 keep, one record after the other

A record is on disk before the reply that rests on it leaves, and is never changed. The server names in each ask the round that
its client goes on from: that one stays, the one before it (the server may fall back to an older checkpoint), the best one, and
newer ones that no ask has named yet. A file goes when no record in it is needed any more. Nobody is told that a reply counted or
not, so a crash at any moment, a lost reply or an older checkpoint need no repair.
"""

import os
import struct
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, NamedTuple
from weakref import finalize

from fedlora import wire
from fedlora.disk import digest
from fedlora.types import Tensors

RECORD = struct.Struct("<4sqq16s")  # what stands before a state's bytes: MAGIC, the client's id, their number, their digest
MAGIC = b"fls1"


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
    """Where the bytes of one client's ClientState lie, and their digest, 32 hexadecimal digits."""

    file: str
    start: int
    length: int
    digest: str


class StateStore:
    """What every client keeps that was played here or by another worker of the same folder. Clients stay with their worker while it
    runs: a worker reads what others wrote before it started, and writes to files of its own."""

    def __init__(self, folder: Path | None, classes: Sequence[type[Any]], worker: int = 0) -> None:
        """`folder` is a temporary one where it is None; `classes` are those that what is kept may hold."""
        self.folder = Path(mkdtemp()) if folder is None else folder
        self._durable = folder is not None
        if folder is None:
            finalize(self, rmtree, self.folder, ignore_errors=True)
        self.worker = worker
        self._classes = list(classes)
        self._places: dict[int, dict[int, Location]] = {}  # client -> round -> where
        self._needed: Counter[str] = Counter()  # file -> how many of its records are among those
        self._ends: dict[str, int] = {}  # file -> where its whole records end
        self._waiting: dict[int, list[tuple[int, ClientState]]] = {}
        for file in sorted(self.folder.glob("round-*.states")):
            self._read_records(file)

    def rounds(self, id: int) -> list[int]:
        """The rounds of which there is something of this client."""
        return sorted(self._places.get(id, ()))

    def get(self, id: int, round: int) -> ClientState | None:
        """What a client kept in a round; None where that is not here, or damaged."""
        place = self._places.get(id, {}).get(round)
        if place is None:
            return None
        try:
            return read(self.folder, place, self._classes)
        except ValueError:
            return None

    def put(self, id: int, round: int, state: ClientState) -> None:
        """What a client keeps if its reply of this round counts: there after `flush`, which comes before the reply leaves."""
        self._waiting.setdefault(round, []).append((id, state))

    def flush(self) -> None:
        """Bring to disk what was put."""
        for round, records in self._waiting.items():
            name = f"round-{round:05d}-{self.worker}.states"
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / name, "ab") as file:
                file.truncate(self._ends.get(name, 0))  # a record that a kill cut off
                file.seek(0, os.SEEK_END)
                for id, state in records:
                    data = wire.encode(state)
                    file.write(RECORD.pack(MAGIC, id, len(data), bytes.fromhex(digest(data))))
                    self._note(id, round, Location(name, file.tell(), len(data), digest(data)))
                    file.write(data)
                self._ends[name] = file.tell()
                # Of clients that keep nothing, nothing is lost where the disk loses it.
                if self._durable and not all(state.is_empty for _, state in records):
                    file.flush()
                    os.fsync(file.fileno())
        self._waiting.clear()

    def release(self, id: int, held: int, best: int = 0) -> None:
        """The server goes on from `held`: forget the rounds before it but for the last of them and `best`."""
        own = self._places.get(id, {})
        before = [round for round in own if round < held]
        for round in set(before) - {max(before, default=0), best}:
            name = own.pop(round).file
            self._needed[name] -= 1
            if not self._needed[name]:
                (self.folder / name).unlink(missing_ok=True)
                self._ends.pop(name, None)

    def _note(self, id: int, round: int, place: Location) -> None:
        """The newest record of a client's round is the one that counts."""
        own = self._places.setdefault(id, {})
        if round in own:
            self._needed[own[round].file] -= 1
        own[round] = place
        self._needed[place.file] += 1

    def _read_records(self, file: Path) -> None:
        """Note where the whole records of a file lie."""
        size = file.stat().st_size
        round = int(file.name.split("-")[1])
        self._ends[file.name] = 0
        with file.open("rb") as stream, suppress(struct.error):
            while True:
                magic, id, length, its_digest = RECORD.unpack(stream.read(RECORD.size))
                start = stream.tell()
                if magic != MAGIC or length < 0 or start + length > size:
                    return
                self._note(id, round, Location(file.name, start, length, its_digest.hex()))
                self._ends[file.name] = stream.seek(length, os.SEEK_CUR)


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
    kept: ClientState = wire.decode(data, [ClientState, *classes])
    return kept
