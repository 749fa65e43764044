"""What the server and the workers that play clients say to each other, and the one seam between them: `exchange(asks) -> answers`.

    server    Hello               ->  worker    of another machine: says who it is
              Present, Lost       <-
              Notice              ->            how it stands, for people; answered with Present
              TrainAsk, ScoreAsk  ->            plays each client from the state that the ask names
              Reply, Scored, Behind, Forgot, Lost  <-

An ask holds all that its client needs beside what it keeps itself, so it can be sent again, to a worker that has just started, too.
Each exchange has an envelope of its own, which answers repeat: an answer that comes late, twice or unasked opens no door. What a
client keeps is named by the round that it comes from (`held`), so that no message has to say that a reply counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlora.types import Client, Model, Reply, Tensors

SERVER = -1  # the id of the client that stands for the server's own data
TEST, VALIDATION = "test", "validation"  # parts of the data that models are scored on


@dataclass(frozen=True)
class Envelope:
    """Which exchange a message belongs to.

    Attributes:
        incarnation: how often the server has been started; a worker that sees another one takes its base back to version 0.
        exchange: counts the exchanges since that start.
    """

    incarnation: int = 0
    exchange: int = 0


UNSENT = Envelope()


@dataclass(frozen=True)
class TrainAsk:
    """Train in a round.

    Attributes:
        round: the number of rounds aggregated before, plus one.
        down: the method's message.
        head: of the model; empty unless the head is shared.
        held: the round whose reply of this client was the last one that counted: it goes on from what it kept then. 0 is the start.
        best: the same for the round that the server may go back to as the best one; 0 where there is none.
    """

    round: int
    client: Client
    down: Any
    head: Tensors = field(default_factory=dict)
    held: int = 0
    best: int = 0
    envelope: Envelope = UNSENT


@dataclass(frozen=True)
class ScoreAsk:
    """Score a model on the client's own examples of a part.

    Attributes:
        part: TEST or VALIDATION.
        model: what to score; None is the client's own, made from `down` (sent with since = 0) and what it keeps.
        held: as in TrainAsk; the head of a client with a head of its own is that of this round, too.
    """

    round: int
    client: Client
    part: str
    model: Model | None = None
    down: Any = None
    head: Tensors = field(default_factory=dict)
    held: int = 0
    envelope: Envelope = UNSENT


Ask = TrainAsk | ScoreAsk


@dataclass(frozen=True)
class Hello:
    """Asked of a worker of another machine before anything else: who are you, and do we agree?

    Attributes:
        facts: what must be the same everywhere, by name: a version, or a digest.
    """

    facts: Mapping[str, str]


@dataclass(frozen=True)
class Present:
    """The answer to a Hello, of a worker that plays one client.

    Attributes:
        name: the client's.
        num_examples: to train on, and `domains` of each data set of a run of several.
        num_test, num_validation: to be scored on.
        facts: as in Hello.
    """

    name: str
    num_examples: int
    domains: Mapping[str, int]
    num_test: int
    num_validation: int
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Notice:
    """Told to a worker of another machine, for the people there: why it is left out, or that all is done."""

    text: str


@dataclass(frozen=True)
class Unstarted:
    """Said by a worker that cannot play any client, and why."""

    why: str


@dataclass(frozen=True)
class Scored:
    """Sums over the client's examples, which add up over clients to what scores are made of (see `fedlora.tasks.metrics`)."""

    sums: Tensors


@dataclass(frozen=True)
class Behind:
    """The worker's base is at this version, and the ask's base update starts after it."""

    version: int


@dataclass(frozen=True)
class Forgot:
    """The worker does not have what the client kept in the round that the ask names."""


@dataclass(frozen=True)
class Lost:
    """There is no answer, and why."""

    why: str


Body = Reply | Scored | Behind | Forgot | Lost


@dataclass(frozen=True)
class Answer:
    """A client's answer to the ask that it got in this envelope."""

    envelope: Envelope
    client: int
    body: Body


# What crosses the wire beside a method's own.
CLASSES = (Envelope, TrainAsk, ScoreAsk, Scored, Behind, Forgot, Lost, Unstarted, Answer)
MEETING = (Hello, Present, Lost, Notice)  # the same before a run begins


class Transport(Protocol):
    """Carries the asks of an exchange to workers, and answers back."""

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        """The answers to asks of one kind and one envelope, in whatever order they come; a client that gives none is left out, or
        Lost."""

    def close(self) -> None:
        """Let the workers go."""
