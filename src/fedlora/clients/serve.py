"""A worker behind bytes, as another process or machine has it: asks come in, answers go out.

A tuple of asks comes in two parts (`whole`), so that what several workers are told is encoded once. In streams each part, and each
answer, is its length, eight bytes, and its bytes.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

from torch import Tensor

from fedlora import messages, wire
from fedlora.clients.worker import Worker
from fedlora.disk import digest
from fedlora.messages import UNSENT, Answer, Ask, TrainAsk
from fedlora.transforms import pipeline
from fedlora.types import Method, Reply

LENGTH = 8  # bytes
BUNDLE = 1 << 22  # bytes that fill a bundle
HELD = 0.1  # seconds for which an answer waits for the next one to join it; however late that one is, both go then


def classes(method: Method) -> list[type[Any]]:
    """All that messages between a server and its workers may hold."""
    return [*messages.CLASSES, *pipeline.message_classes(), *wire.message_classes(method)]


def parts(messages: Mapping[int, Any]) -> tuple[bytes, dict[int, bytes]]:
    """Messages to several workers in two parts: the tensors that more than one of them holds, as a round's update of the base, once
    for all; and what is each one's own."""
    uses: dict[int, int] = {}
    found: dict[int, Tensor] = {}
    for message in messages.values():
        for tensor in wire.tensors_of(message):
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
            found[id(tensor)] = tensor
    apart = [found[key] for key, count in uses.items() if count > 1]
    return wire.encode(apart), {number: wire.encode(message, apart) for number, message in messages.items()}


def whole(shared: bytes, own: bytes, classes: Sequence[type[Any]]) -> Any:
    """A message of two parts. ValueError: see `wire.decode`."""
    return wire.decode(own, classes, apart=wire.decode(shared, ()))


def write(stream: IO[bytes], data: bytes) -> None:
    """The bytes of one message, or of a part of it."""
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
    incoming = frames(asks)
    for shared, own in zip(incoming, incoming, strict=False):
        for answer in answered(worker, whole(shared, own, known), last):
            write(answers, wire.encode(answer))


def answered(worker: Worker, asks: Sequence[Ask], last: dict[int, tuple[str, Reply]]) -> Iterator[Answer]:
    """The answers to asks; `last` holds the replies of the last exchange in which was trained, and is brought up to date."""
    new: list[Ask] = []
    digests = _digests(asks)
    if digests:  # a new exchange: what belongs to the one before is not asked for any more
        for id in last.keys() - digests.keys():
            del last[id]
    for ask in asks:
        if isinstance(ask, TrainAsk):
            known, reply = last.get(ask.client.id, ("", None))
            if known == digests[ask.client.id] and reply is not None:
                yield Answer(ask.envelope, ask.client.id, reply)
                continue
        new.append(ask)
    for answer in worker.answer(new):
        if isinstance(answer.body, Reply):
            last[answer.client] = digests[answer.client], answer.body
        yield answer


def bundles(answers: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Answers that come fast, several together, where each thing that is sent costs about as much as a step."""
    bundle: list[bytes] = []
    due = 0.0
    for answer in answers:
        if not bundle:
            due = time.monotonic() + HELD
        bundle.append(answer)
        if sum(map(len, bundle)) >= BUNDLE or time.monotonic() >= due:
            yield bundle
            bundle = []
    if bundle:
        yield bundle


def _digests(asks: Sequence[Ask]) -> dict[int, str]:
    """Of each client that is asked to train, what its ask is told by; a tensor that many are sent is read once."""
    told: dict[int, bytes] = {}
    found = {}
    for ask in asks:
        if isinstance(ask, TrainAsk):
            tensors = wire.tensors_of(ask)
            for tensor in tensors:
                if id(tensor) not in told:
                    told[id(tensor)] = digest(wire.encode([tensor])).encode()
            outline = wire.encode(replace(ask, envelope=UNSENT), tensors)
            found[ask.client.id] = digest(b"".join([outline, *(told[id(tensor)] for tensor in tensors)]))
    return found
