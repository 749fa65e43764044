"""What a gather is: it turns a round's asks into the replies that a method aggregates; and what is counted meanwhile."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlora import wire
from fedlora.messages import Envelope, TrainAsk, Transport
from fedlora.types import Reply


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
    forgotten: list[int] = field(default_factory=list)  # clients whose worker had lost what they kept: they started anew
    loss: float = 0.0  # sum over the examples of the accepted clients whose loss is a number
    examples: int = 0  # of those
    exchange_s: float = 0.0  # wall seconds in the transport
    aggregate_s: float = 0.0
    wire_s: float = 0.0  # measuring, unpacking, checking and storing messages

    @property
    def failed(self) -> dict[int, str]:
        """Client -> why its reply does not count."""
        return dict(sorted({**self.refused, **self.lost}.items()))

    @contextmanager
    def on_the_wire(self) -> Iterator[None]:
        """Within, time is that of messages."""
        start = time.perf_counter()
        yield
        self.wire_s += time.perf_counter() - start


class Gather(Protocol):
    """How the replies of a round come together before a method aggregates them."""

    def collect(
        self, state: Any, asks: Sequence[TrainAsk], transport: Transport, envelopes: Iterator[Envelope], counts: RoundCounts
    ) -> Iterator[Reply]:
        """What may be aggregated, as it comes. `counts` takes note of clients without a reply that counts, and of the traffic."""
