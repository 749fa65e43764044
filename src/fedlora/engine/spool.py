"""A round's replies, as bytes until they are aggregated: memory of one reply, read in the order of client ids however they came,
and as often as it takes to leave one out."""

from collections.abc import Collection, Iterator, Sequence
from tempfile import SpooledTemporaryFile
from typing import Any

from fedlora.engine import wire
from fedlora.types import Reply

IN_MEMORY = 1 << 27  # bytes; what is above goes to a temporary file


class Spool:
    """The accepted replies of one round. To be closed, or used in a `with`."""

    def __init__(self, classes: Sequence[type[Any]]) -> None:
        """`classes` are those that an Up may hold."""
        self._classes = list(classes)
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  closed by `__exit__`
        self._places: dict[int, tuple[int, int]] = {}  # client -> start and length

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, reply: Reply) -> None:
        data = wire.encode(reply)
        start = self._file.seek(0, 2)
        self._file.write(data)
        self._places[reply.client.id] = start, len(data)

    def clients(self) -> list[int]:
        return sorted(self._places)

    def replies(self, clients: Collection[int]) -> Iterator[Reply]:
        """The replies of these clients, in order of their ids."""
        return (self.reply(id) for id in self.clients() if id in clients)

    def reply(self, id: int) -> Reply:
        start, length = self._places[id]
        self._file.seek(start)
        reply: Reply = wire.decode(self._file.read(length), self._classes)
        return reply
