"""The round loop, the same for every method and every transport."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora import wire
from fedlora.algebra.tensors import weighted_mean
from fedlora.check import cast, refuse, unasked
from fedlora.errors import RunFailed, first_line
from fedlora.server.aggregate import OVERFLOW, aggregate
from fedlora.server.spool import Spool
from fedlora.transforms.pipeline import UNCHANGED, Pipeline
from fedlora.transports.transport import Transport
from fedlora.types import Client, Diagnostics, Method, Order, Reply, Setup, Tensors
from fedlora.wire import DAMAGE, message_classes


@dataclass(frozen=True)
class Server:
    """What the server carries from round to round: with it and what clients keep, a run goes on as if never interrupted."""

    round: int  # the last one that is complete
    state: Any
    head: Tensors = field(default_factory=dict)  # the shared head's parameters; empty unless the head is shared
    accepted: Mapping[int, int] = field(default_factory=dict)  # client -> the last round in which its reply counted


@dataclass(frozen=True)
class Traffic:
    """What crossed the wire in one direction, over all clients of a round."""

    params: int = 0
    size: wire.Size = wire.Size()

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.params + other.params, self.size + other.size)


@dataclass
class RoundCounts:
    """What is counted while a round's replies go by."""

    up: Traffic = Traffic()
    down: Traffic = Traffic()
    accepted: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)  # client -> what was wrong with its reply
    lost: dict[int, str] = field(default_factory=dict)  # client -> why there is none
    loss: float = 0.0  # sum over the examples of the accepted clients whose loss is a number
    examples: int = 0  # of those
    exchange_s: float = 0.0  # wall seconds in the transport
    aggregate_s: float = 0.0
    wire_s: float = 0.0  # measuring, unpacking, checking and storing messages

    @property
    def failed(self) -> dict[int, str]:
        """Client -> why its reply does not count."""
        return dict(sorted({**self.refused, **self.lost}.items()))


def rounds(
    method: Method,
    setup: Setup,
    server: Server,
    transport: Transport,
    participants: Callable[[int], Sequence[Client]],
    transforms: Pipeline = UNCHANGED,
    retries: int = 1,
) -> Iterator[tuple[Server, RoundCounts, Diagnostics]]:
    """Play the rounds after `server.round` up to the last one of the setup; yields the server after each.

    Args:
        retries: how often a round is played again whose replies were all lost.

    Raises:
        RunFailed: no reply of a round counts; the state is that of the round before.
    """
    for t in range(server.round + 1, setup.rounds + 1):
        for _ in range(1 + retries):
            server, tally, diagnostics = _play(method, setup, server, transport, participants(t), transforms)
            transport.commit(tally.accepted)
            if tally.accepted or tally.refused:
                break
        if not tally.accepted:
            id, why = next(iter(sorted((tally.refused or tally.lost).items())), (None, "no client takes part"))
            count = f"none of {len(tally.failed)} replies counts: " if len(tally.failed) > 1 else ""
            why += "; a lower train.lr may help" if "finite" in why else ""
            raise RunFailed(f"round {t}: {count}{why if id is None else f'client {id}: {why}'}")
        yield server, tally, diagnostics


def _play(
    method: Method, setup: Setup, server: Server, transport: Transport, clients: Sequence[Client], transforms: Pipeline
) -> tuple[Server, RoundCounts, Diagnostics]:
    """One round; the same server where no reply counts."""
    t = server.round + 1
    orders = [Order(t, client, method.send(server.state, client, t), server.head) for client in clients]
    tally = RoundCounts()
    with _clock(tally):
        tally.down = _sent(orders)
    with Spool(message_classes(method)) as spool:
        for reply, sent in _accepted(method, setup, server.state, orders, transport, transforms, tally):
            with _clock(tally):
                spool.put(reply)
                tally.up += sent
        if not spool.clients():
            return server, tally, {}
        start = time.perf_counter()
        state, diagnostics, poison = aggregate(method, server.state, spool, t)
        tally.refused |= dict.fromkeys(poison, OVERFLOW)
        head = server.head
        tally.accepted = [id for id in spool.clients() if id not in poison]
        for reply in spool.replies(tally.accepted):
            if isinstance(reply.loss, float) and math.isfinite(reply.loss):
                tally.loss += reply.loss * reply.client.num_examples
                tally.examples += reply.client.num_examples
        if server.head and tally.accepted:
            (head,) = weighted_mean((reply.client.num_examples, (reply.head,)) for reply in spool.replies(tally.accepted))
        tally.aggregate_s = time.perf_counter() - start
    accepted = {**server.accepted, **dict.fromkeys(tally.accepted, t)}
    return Server(t, state, head, accepted) if tally.accepted else server, tally, diagnostics


def _accepted(
    method: Method,
    setup: Setup,
    state: Any,
    orders: Sequence[Order],
    transport: Transport,
    transforms: Pipeline,
    tally: RoundCounts,
) -> Iterator[tuple[Reply, Traffic]]:
    """The replies that may be aggregated, and what they weighed on their way. Who sends none, or one that is refused, is noted in
    the tally."""
    expected = {order.client.id: order for order in orders}
    replies = iter(transport.exchange(orders))
    while True:
        start = time.perf_counter()
        reply = next(replies, None)
        tally.exchange_s += time.perf_counter() - start
        if reply is None:
            break
        order = expected.pop(reply.client.id, None)
        if order is None:
            continue  # nobody asked, or it has answered already
        with _clock(tally):
            try:
                up, head = cast(transforms.unpack(reply.up), setup.dtype), {n: x.to(setup.dtype) for n, x in reply.head.items()}
                why = refuse(up, method, setup, order.client) or unasked(up, method, state, order.client, order.round)
                why = why or _refuse_head(head, order.head)
            except (ValueError, *DAMAGE) as error:
                why = first_line(error)
            if why is None:
                sent = _traffic(reply.up, reply.head, transforms)
        if why is None:
            yield replace(reply, client=order.client, up=up, head=head), sent
        else:
            tally.refused[order.client.id] = why
    tally.lost |= dict.fromkeys(expected, "no reply")


@contextmanager
def _clock(tally: RoundCounts) -> Iterator[None]:
    start = time.perf_counter()
    yield
    tally.wire_s += time.perf_counter() - start


def _refuse_head(got: Tensors, sent: Tensors) -> str | None:
    if {n: x.shape for n, x in got.items()} != {n: x.shape for n, x in sent.items()}:
        return "head: its parameters are not those that were sent"
    bad = next((n for n, x in got.items() if not bool(x.isfinite().all())), None)
    return None if bad is None else f"head: {bad} is not finite"


def _sent(orders: Sequence[Order]) -> Traffic:
    """What the orders weigh; a message that many clients get is measured once."""
    known: dict[tuple[int, int], Traffic] = {}
    total = Traffic()
    for order in orders:
        key = id(order.down), id(order.head)
        if key not in known:
            known[key] = _traffic(order.down, order.head)
        total += known[key]
    return total


def _traffic(message: Any, head: Tensors, transforms: Pipeline = UNCHANGED) -> Traffic:
    size = transforms.measure(message)
    return Traffic(size.numbers, size + wire.measure(head) if head else size)
