"""A round's replies until they are aggregated, read in the order of client ids however they came, and as often as it takes to leave
one out. Beyond a limit they are bytes in a temporary file, so that memory does not grow with their number."""

from collections.abc import Collection, Iterator, Sequence
from tempfile import TemporaryFile
from typing import Any

from fedlora import wire
from fedlora.types import Reply

IN_MEMORY = 1 << 27  # bytes of tensors


class Spool:
    """The accepted replies of one round. To be closed, or used in a `with`."""

    def __init__(self, classes: Sequence[type[Any]]) -> None:
        """`classes` are those that an Up may hold."""
        self._classes = list(classes)
        self._here: dict[int, Reply] = {}
        self._size = 0  # of those
        self._file = TemporaryFile()  # noqa: SIM115  closed by `__exit__`
        self._places: dict[int, tuple[int, int]] = {}  # client -> start and length in the file

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, reply: Reply) -> None:
        size = sum(t.nbytes for t in wire.tensors_of(reply))
        if self._size + size <= IN_MEMORY:
            self._here[reply.client.id] = reply
            self._size += size
            return
        data = wire.encode(reply)
        self._places[reply.client.id] = self._file.seek(0, 2), len(data)
        self._file.write(data)

    def clients(self) -> list[int]:
        return sorted([*self._here, *self._places])

    def replies(self, clients: Collection[int]) -> Iterator[Reply]:
        """The replies of these clients, in order of their ids."""
        return (self.reply(id) for id in sorted(clients))

    def reply(self, id: int) -> Reply:
        if id in self._here:
            return self._here[id]
        start, length = self._places[id]
        self._file.seek(start)
        reply: Reply = wire.decode(self._file.read(length), self._classes)
        return reply
