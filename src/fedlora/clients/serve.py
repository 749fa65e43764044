"""A worker behind two streams of bytes, as another process or machine has it: asks come in, answers go out.

A message is its length, eight bytes, and the bytes of `fedlora.wire`: a tuple of asks, or one answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import IO, Any

from fedlora import messages, wire
from fedlora.clients.worker import Worker
from fedlora.disk import digest
from fedlora.messages import UNSENT, Answer, Ask, TrainAsk
from fedlora.transforms import pipeline
from fedlora.types import Method, Reply

LENGTH = 8  # bytes


def classes(method: Method) -> list[type[Any]]:
    """All that messages between a server and its workers may hold."""
    return [*messages.CLASSES, *pipeline.message_classes(), *wire.message_classes(method)]


def write(stream: IO[bytes], message: Any) -> None:
    """One message."""
    data = wire.encode(message)
    stream.write(len(data).to_bytes(LENGTH, "big") + data)
    stream.flush()


def frames(stream: IO[bytes]) -> Iterator[bytes]:
    """The bytes of each message, until the stream ends."""
    while len(head := stream.read(LENGTH)) == LENGTH:
        data = stream.read(int.from_bytes(head, "big"))
        if len(data) < int.from_bytes(head, "big"):
            return
        yield data


def serve(worker: Worker, asks: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until there are no more asks. A client that is asked again for what it has just trained sends the same reply again."""
    known = classes(worker.method)
    last: dict[int, tuple[str, Reply]] = {}  # client -> the digest of its ask, and its reply
    for data in frames(asks):
        for answer in answered(worker, wire.decode(data, known), last):
            write(answers, answer)


def answered(worker: Worker, asks: Sequence[Ask], last: dict[int, tuple[str, Reply]]) -> Iterator[Answer]:
    """The answers to asks; `last` holds the last reply of each client, and is brought up to date."""
    new: list[Ask] = []
    digests: dict[int, str] = {}
    for ask in asks:
        if isinstance(ask, TrainAsk):
            digests[ask.client.id] = digest(wire.encode(replace(ask, envelope=UNSENT)))
            known, reply = last.get(ask.client.id, ("", None))
            if known == digests[ask.client.id] and reply is not None:
                yield Answer(ask.envelope, ask.client.id, reply)
                continue
        new.append(ask)
    for answer in worker.answer(new):
        if isinstance(answer.body, Reply):
            last[answer.client] = digests[answer.client], answer.body
        yield answer
