"""The round loop, the same for every method and every transport."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from fedlora.algebra.tensors import weighted_mean
from fedlora.errors import RunFailed
from fedlora.gather.gather import Gather, RoundCounts
from fedlora.messages import Envelope, TrainAsk, Transport
from fedlora.server.aggregate import OVERFLOW, aggregate
from fedlora.server.spool import Spool
from fedlora.types import Client, Diagnostics, Method, Setup, Tensors
from fedlora.wire import message_classes


@dataclass(frozen=True)
class Server:
    """What the server carries from round to round: with it and what clients keep, a run goes on as if never interrupted."""

    round: int  # the last one that is complete
    state: Any
    head: Tensors = field(default_factory=dict)  # the shared head's parameters; empty unless the head is shared
    accepted: Mapping[int, int] = field(default_factory=dict)  # client -> the last round in which its reply counted


@dataclass(frozen=True)
class Federation:
    """What a server works with, the same in every round.

    Attributes:
        participants: who takes part in a round.
        envelopes: of exchanges, each one once.
        retries: how often a round is asked for again whose replies were all lost.
    """

    method: Method
    setup: Setup
    transport: Transport
    gather: Gather
    participants: Callable[[int], Sequence[Client]]
    envelopes: Iterator[Envelope] = field(default_factory=lambda: envelopes(0))
    retries: int = 1


def envelopes(incarnation: int) -> Iterator[Envelope]:
    """Those of a server that has been started so often."""
    return (Envelope(incarnation, exchange) for exchange in count(1))


def play_round(
    federation: Federation, server: Server, best: Mapping[int, int] | None = None
) -> tuple[Server, RoundCounts, Diagnostics]:
    """The server after the next round, what was counted, and what the method says about it.

    Args:
        best: `accepted` of the server that the run may go back to as the best one.

    Raises:
        RunFailed: no reply counts; the state is that of the round before.
    """
    for _ in range(1 + federation.retries):
        server, counts, diagnostics = _attempt(federation, server, best or {})
        if counts.accepted:
            return server, counts, diagnostics
        if counts.refused:
            break
    id, why = next(iter(sorted((counts.refused or counts.lost).items())), (None, "no client takes part"))
    many = f"none of {len(counts.failed)} replies counts: " if len(counts.failed) > 1 else ""
    why += "; a lower train.lr may help" if "finite" in why else ""
    raise RunFailed(f"round {server.round + 1}: {many}{why if id is None else f'client {id}: {why}'}")


def _attempt(federation: Federation, server: Server, best: Mapping[int, int]) -> tuple[Server, RoundCounts, Diagnostics]:
    """The same server where no reply counts."""
    method, t = federation.method, server.round + 1
    asks = [
        TrainAsk(t, c, method.send(server.state, c, t), server.head, server.accepted.get(c.id, 0), best.get(c.id, 0))
        for c in federation.participants(t)
    ]
    counts = RoundCounts()
    with Spool(message_classes(method)) as spool:
        for reply in federation.gather.collect(server.state, asks, federation.transport, federation.envelopes, counts):
            with counts.on_the_wire():
                spool.put(reply)
        if not spool.clients():
            return server, counts, {}
        start = time.perf_counter()
        state, diagnostics, poison = aggregate(method, server.state, spool, t)
        counts.refused |= dict.fromkeys(poison, OVERFLOW)
        head = server.head
        counts.accepted = [id for id in spool.clients() if id not in poison]
        for reply in spool.replies(counts.accepted):
            if isinstance(reply.loss, float) and math.isfinite(reply.loss):
                counts.loss += reply.loss * reply.client.num_examples
                counts.examples += reply.client.num_examples
        if server.head and counts.accepted:
            (head,) = weighted_mean((reply.client.num_examples, (reply.head,)) for reply in spool.replies(counts.accepted))
        counts.aggregate_s = time.perf_counter() - start
    accepted = {**server.accepted, **dict.fromkeys(counts.accepted, t)}
    return Server(t, state, head, accepted) if counts.accepted else server, counts, diagnostics
