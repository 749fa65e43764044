"""Every reply by itself, checked before it counts: what a method's own mean is then made of."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora import wire
from fedlora.check import cast, refuse, unasked
from fedlora.errors import first_line
from fedlora.gather.exchange import answers
from fedlora.gather.gather import RoundCounts, Traffic
from fedlora.messages import Behind, Envelope, Forgot, Lost, TrainAsk, Transport
from fedlora.transforms.pipeline import UNCHANGED, Pipeline
from fedlora.types import Method, Reply, Setup, Tensors
from fedlora.wire import DAMAGE


@dataclass(frozen=True)
class Mean:
    """Gathers the replies of a round as they are."""

    method: Method
    setup: Setup
    transforms: Pipeline = UNCHANGED

    def collect(
        self, state: Any, asks: Sequence[TrainAsk], transport: Transport, envelopes: Iterator[Envelope], counts: RoundCounts
    ) -> Iterator[Reply]:
        """The replies that may be aggregated, as they come."""

        def again(ask: TrainAsk, why: Behind | Forgot) -> TrainAsk:
            """All that the worker lost, sent once more; who forgot what it kept begins with `hold`."""
            since = why.version if isinstance(why, Behind) else 0
            if isinstance(why, Forgot):
                counts.forgotten.append(ask.client.id)
                ask = replace(ask, held=0, best=0)
            more = replace(ask, down=self.method.send(state, ask.client, ask.round, since=since))
            with counts.on_the_wire():
                counts.down += sent([more])
            return more

        with counts.on_the_wire():
            counts.down += sent(asks)
        missing = {ask.client.id for ask in asks}
        bodies = answers(asks, transport, envelopes, again)
        while True:
            start = time.perf_counter()
            ask, body = next(bodies, (None, None))
            counts.exchange_s += time.perf_counter() - start
            if ask is None:
                break
            id = ask.client.id
            missing.discard(id)
            if isinstance(body, Lost):
                counts.lost[id] = first_line(body.why[:200])
                continue
            with counts.on_the_wire():
                checked = self._checked(state, ask, body)
                if isinstance(checked, Reply):
                    assert isinstance(body, Reply)
                    counts.up += _traffic(body.up, body.head, self.transforms)
            if isinstance(checked, Reply):
                yield checked
            else:
                counts.refused[id] = checked
        counts.lost |= dict.fromkeys(sorted(missing), "no reply")

    def _checked(self, state: Any, ask: TrainAsk, body: Any) -> Reply | str:
        """A reply as the method may have it, or why it must not."""
        if not isinstance(body, Reply):
            return f"it answers with {type(body).__name__}"
        try:
            up = cast(self.transforms.unpack(body.up), self.setup.dtype)
            head = {n: x.to(self.setup.dtype) for n, x in body.head.items()}
            why = refuse(up, self.method, self.setup, ask.client) or unasked(up, self.method, state, ask.client, ask.round)
            why = why or _refuse_head(head, ask.head)
        except (ValueError, *DAMAGE) as error:
            why = first_line(error)
        return why or replace(body, client=ask.client, up=up, head=head)


def _refuse_head(got: Tensors, sent: Tensors) -> str | None:
    if {n: x.shape for n, x in got.items()} != {n: x.shape for n, x in sent.items()}:
        return "head: its parameters are not those that were sent"
    bad = next((n for n, x in got.items() if not bool(x.isfinite().all())), None)
    return None if bad is None else f"head: {bad} is not finite"


def sent(asks: Sequence[TrainAsk]) -> Traffic:
    """What the asks weigh; a message that many clients get is measured once."""
    known: dict[tuple[int, int], Traffic] = {}
    total = Traffic()
    for ask in asks:
        key = id(ask.down), id(ask.head)
        if key not in known:
            known[key] = _traffic(ask.down, ask.head)
        total += known[key]
    return total


def _traffic(message: Any, head: Tensors, transforms: Pipeline = UNCHANGED) -> Traffic:
    size = transforms.measure(message)
    return Traffic(size.numbers, size + wire.measure(head) if head else size)
