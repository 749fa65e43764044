"""The round loop, the same for every method and every transport."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora import seeds
from fedlora.algebra.tensors import weighted_mean
from fedlora.engine import wire
from fedlora.engine.check import missing, refuse
from fedlora.engine.pipeline import UNCHANGED, Pipeline
from fedlora.engine.transport import Transport
from fedlora.types import Client, Diagnostics, Method, Order, Reply, Setup, Tensors


@dataclass(frozen=True)
class Server:
    """What the server carries from round to round: with it and what clients keep, a run goes on as if never interrupted."""

    round: int  # the last one that is complete
    state: Any
    head: Tensors = field(default_factory=dict)  # the shared head's parameters; empty unless the head is shared


@dataclass(frozen=True)
class Traffic:
    """What crossed the wire in one direction, over all clients of a round."""

    params: int = 0
    size: wire.Size = wire.Size()

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.params + other.params, self.size + other.size)


@dataclass
class Tally:
    """What is counted while a round's replies go by."""

    up: Traffic = Traffic()
    down: Traffic = Traffic()
    accepted: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)  # client -> why
    loss: float = 0.0
    examples: int = 0
    exchange_s: float = 0.0  # wall seconds in the transport
    aggregate_s: float = 0.0
    wire_s: float = 0.0  # measuring, unpacking and checking messages


def rounds(
    method: Method,
    setup: Setup,
    server: Server,
    transport: Transport,
    participants: Callable[[int], Sequence[Client]],
    transforms: Pipeline = UNCHANGED,
) -> Iterator[tuple[Server, Tally, Diagnostics]]:
    """Play the rounds after `server.round` up to the last one of the setup; yields the server after each."""
    for t in range(server.round + 1, setup.rounds + 1):
        orders = [Order(t, client, method.send(server.state, client), server.head) for client in participants(t)]
        tally = Tally()
        with _clock(tally):
            tally.down = _sent(orders)
        heads: list[tuple[float, tuple[Tensors]]] = []
        replies = _accepted(method, setup, server.state, orders, transport, transforms, tally, heads)
        first = next(replies, None)
        state, head = server.state, server.head
        diagnostics: Diagnostics = {}
        if first is not None:
            start, waited = time.perf_counter(), tally.exchange_s + tally.wire_s
            state, diagnostics = method.aggregate(state, _chain(first, replies))
            for _ in replies:
                raise AssertionError("aggregate must take every reply")
            tally.aggregate_s = time.perf_counter() - start - (tally.exchange_s + tally.wire_s - waited)
            if server.head:
                (head,) = weighted_mean(heads)
        transport.commit(tally.accepted)
        server = Server(t, state, head)
        yield server, tally, diagnostics


def sampler(setup: Setup, sample: int | float) -> Callable[[int], list[Client]]:
    """Who takes part in a round: `sample` of the clients that have data (a number, or a share up to 1.0), drawn by the round."""
    able = [client for client in setup.clients if client.num_examples > 0]
    count = min(len(able), sample if isinstance(sample, int) else max(1, round(sample * len(able))))

    def draw(round: int) -> list[Client]:
        chosen = seeds.generator(setup.seed, "participants", round).permutation(len(able))[:count]
        return [able[i] for i in sorted(chosen)]

    return draw


def _accepted(
    method: Method,
    setup: Setup,
    state: Any,
    orders: Sequence[Order],
    transport: Transport,
    transforms: Pipeline,
    tally: Tally,
    heads: list[tuple[float, tuple[Tensors]]],
) -> Iterator[Reply]:
    """The replies that count. Whoever sends none, or one that is refused, is counted in `tally.failed`."""
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
            continue  # nobody asked
        with _clock(tally):
            try:
                up = transforms.unpack(reply.up)
                why = refuse(up, method, setup, order.client) or missing(up, method, state) or _refuse_head(reply.head, order.head)
            except ValueError as error:
                why = str(error)
            if why is None:
                tally.up += _traffic(reply.up, reply.head, transforms)
        if why is not None:
            tally.failed[order.client.id] = why
            continue
        tally.accepted.append(order.client.id)
        tally.loss += reply.loss * order.client.num_examples
        tally.examples += order.client.num_examples
        if order.head:
            heads.append((order.client.num_examples, (reply.head,)))
        yield replace(reply, client=order.client, up=up)
    tally.failed |= {id: "no reply" for id in expected}


@contextmanager
def _clock(tally: Tally) -> Iterator[None]:
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


def _chain(first: Reply, rest: Iterator[Reply]) -> Iterator[Reply]:
    yield first
    yield from rest
