"""Clients in the server's own process: nothing is copied, and what one worker answers comes as it is made."""

from collections.abc import Iterator, Mapping, Sequence

from fedlora.clients.worker import Worker
from fedlora.messages import Answer, Ask


class InProcess:
    """A transport to one worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        return self.worker.answer(asks)

    def close(self) -> None: ...


class EachItsOwn:
    """A transport to a worker for each client, by the client's id."""

    def __init__(self, workers: Mapping[int, Worker]) -> None:
        self.workers = workers

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        for ask in asks:
            yield from self.workers[ask.client.id].answer([ask])

    def close(self) -> None: ...
