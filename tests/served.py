"""Rounds of our own loop over transports that tests make."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedlora.gather.gather import RoundCounts
from fedlora.gather.mean import Mean
from fedlora.messages import Answer, Ask, Transport
from fedlora.server.loop import Federation, Server, play_round
from fedlora.transforms.pipeline import UNCHANGED, Pipeline
from fedlora.types import Client, Diagnostics, Reply, Setup


def rounds(
    method: Any,
    setup: Setup,
    server: Server,
    transport: Transport,
    participants: Callable[[int], Sequence[Client]],
    transforms: Pipeline = UNCHANGED,
    retries: int = 1,
) -> Iterator[tuple[Server, RoundCounts, Diagnostics]]:
    """The server after each round up to the last one of the setup."""
    federation = Federation(method, setup, transport, Mean(method, setup, transforms), participants, retries=retries)
    while server.round < setup.rounds:
        server, counts, diagnostics = play_round(federation, server)
        yield server, counts, diagnostics


def answers(asks: Sequence[Ask], replies: Sequence[Reply]) -> Iterator[Answer]:
    """Replies in the envelope of these asks."""
    return (Answer(asks[0].envelope, reply.client.id, reply) for reply in replies)
