"""Clients in the server's own process: nothing is copied, and what one worker answers comes as it is made."""

from collections.abc import Iterator, Sequence

from fedlora.clients.worker import Worker
from fedlora.messages import Answer, Ask


class InProcess:
    """A transport to one worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        return self.worker.answer(asks)

    def close(self) -> None: ...
