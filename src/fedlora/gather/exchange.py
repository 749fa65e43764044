"""One exchange: asks go out in an envelope of their own, and an answer in any other is no answer to them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fedlora.messages import Answer, Behind, Body, Envelope, Forgot, Lost, ScoreAsk, TrainAsk, Transport

Asked = TypeVar("Asked", TrainAsk, ScoreAsk)


def answers(
    asks: Sequence[Asked], transport: Transport, envelopes: Iterator[Envelope], again: Callable[[Asked, Behind | Forgot], Asked]
) -> Iterator[tuple[Asked, Body]]:
    """Each ask with its client's answer, as they come; a client that gives none is left out.

    Args:
        envelopes: those that no exchange had yet.
        again: what to ask instead of a client whose worker is behind or forgot. It is asked so once.
    """
    wanting: list[Asked] = []
    for ask, body in _first(asks, transport, next(envelopes)):
        if isinstance(body, Behind | Forgot):
            wanting.append(again(ask, body))
        else:
            yield ask, body
    if wanting:
        yield from _first(wanting, transport, next(envelopes))


def _first(asks: Sequence[Asked], transport: Transport, envelope: Envelope) -> Iterator[tuple[Asked, Body]]:
    """Each ask with the first answer to it."""
    expected = {ask.client.id: ask for ask in asks}
    for answer in transport.exchange([replace(ask, envelope=envelope) for ask in asks]):
        if _well_formed(answer) and answer.envelope == envelope and answer.client in expected:
            yield expected.pop(answer.client), answer.body


def _well_formed(answer: Any) -> bool:
    """Whether an answer can be looked at: another machine may have put anything into it."""
    if not isinstance(answer, Answer) or not isinstance(answer.envelope, Envelope):
        return False
    numbers = [answer.client, answer.envelope.incarnation, answer.envelope.exchange]
    if isinstance(answer.body, Behind):
        numbers.append(answer.body.version)
    said = answer.body.why if isinstance(answer.body, Lost) else ""
    return all(type(n) is int for n in numbers) and isinstance(said, str)
