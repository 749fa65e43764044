"""The server's side of a federation over Flower: who is there, and the asks and answers of each exchange.

Flower knows nodes; a node says Hello and is then one of the clients that the configuration names. With keys the operator has given
each of them its name, and it can be no other one. Whoever is asked and does not answer, because its worker died, its node was
started anew or the network was cut, is asked again until the round need not wait for it any longer.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora import wire
from fedlora.clients.node import disagreement
from fedlora.config import TransportConfig
from fedlora.errors import first_line
from fedlora.messages import MEETING, Answer, Ask, Hello, Lost, Notice, Present, TrainAsk
from fedlora.transports.flower.payload import bytes_of, content, pack, unpack
from fedlora.types import Reply

POLL = 0.2  # seconds between two looks for answers
LOOK = 2.0  # seconds between two looks for nodes
AGAIN = 5.0  # seconds before a client is asked again that could not answer
SMALL = 1 << 20  # bytes that an answer to a Hello may have, and a header beside its tensors
STRANGER = "it is not one of the federation's clients"
GOODBYE = 10.0  # seconds in which nodes hear that all is done
LARGEST_TREE = 1 << 22  # bytes of an answer's header: hundreds of times that of a model with a thousand modules


@dataclass(frozen=True)
class Seen:
    """A node as Flower lists it: its number, since when it is there, and the name that its key has, if any."""

    id: int
    since: str
    name: str


@dataclass
class Carried:
    """What went over the link since the last time that somebody asked, in bytes as they travelled."""

    up: int = 0
    down: int = 0
    asked_again: dict[str, str] = field(default_factory=dict)  # client -> why


class Link:
    """A transport to the clients of a federation.

    Attributes:
        names: of the clients, by number.
        present: what those said who are or were there, by number.
        refused: who does not fit, and why, by the name that it gives or its node's number.
    """

    def __init__(
        self,
        grid: Grid,
        names: Sequence[str],
        facts: Mapping[str, str],
        classes: Sequence[type[Any]],
        settings: TransportConfig,
        bound: Callable[[Ask], int],
        registered: bool = True,
        told: Callable[["Link"], None] = lambda link: None,
    ) -> None:
        """
        Args:
            facts: what must be the same here and there.
            classes: what an answer may hold.
            bound: ask -> the most bytes that its answer may have.
            registered: a node is who its key says, and nobody without one is let in.
            told: hears when something here has changed.
        """
        self.grid, self.names, self.facts, self.settings = grid, list(names), dict(facts), settings
        self.bound, self.registered, self.told = bound, registered, told
        self.present: dict[int, Present] = {}
        self.refused: dict[str, str] = {}
        self.carried = Carried()
        self._classes = list(classes)
        self._nodes: dict[int, Seen] = {}  # client -> its node, of those that said Hello and are there
        self._left: dict[int, float] = {}  # client -> when it was last there
        self._met: dict[int, str] = {}  # node -> since when it is there, of those that were greeted
        self._greeted: dict[str, Seen] = {}  # message -> to whom
        self._looked = 0.0

    # ---- who is there --------------------------------------------------------------------------------------------------

    def wait(self, wanted: Iterable[int], minutes: float) -> list[int]:
        """Wait until these clients are there, at most so long; those who are not."""
        wanted, end = list(wanted), time.monotonic() + 60 * minutes
        while missing := [id for id in wanted if id not in self._nodes]:
            if time.monotonic() > end:
                return missing
            self._look()
            time.sleep(POLL)
        return []

    @property
    def connected(self) -> list[int]:
        """The clients that are there now."""
        return sorted(self._nodes)

    def _look(self) -> None:
        """Greet nodes that are new, and note who is there."""
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            there = {}
            for node in self.grid.get_nodes():
                if node.status == "online":
                    there[node.node_id] = Seen(node.node_id, node.last_activated_at, node.name)
            self._met = {id: since for id, since in self._met.items() if id in there}  # who comes back is greeted again
            before = set(self._nodes)
            self._nodes = {id: seen for id, seen in self._nodes.items() if there.get(seen.id) == seen}
            self._left |= dict.fromkeys(before - set(self._nodes), now)
            for seen in there.values():
                if self._met.get(seen.id) != seen.since:
                    self._greet(seen)
            if before != set(self._nodes):
                self.told(self)
        for id in list(self._greeted):
            for message in self.grid.pull_messages([id]):
                self._meet(self._greeted.pop(id), message)
                self.told(self)

    def _greet(self, seen: Seen) -> None:
        self._met[seen.id] = seen.since
        if self.registered and seen.name not in self.names:
            self.refused[seen.name or f"node {seen.id}"] = STRANGER
            return
        self._greeted[self._push(seen, wire.encode(Hello(self.facts)), "hello")] = seen

    def _meet(self, seen: Seen, message: Message) -> None:
        """Take a node's answer to a Hello."""
        who = seen.name or f"node {seen.id}"
        found, why = None, None
        try:
            found = wire.decode(self._bytes(message, SMALL), MEETING, SMALL)
        except ValueError as error:
            why = first_line(error)
        if isinstance(found, Present):
            if (why := self._misfit(seen, found)) is None:
                id = self.names.index(found.name)
                self.present[id], self._nodes[id] = found, seen
                self._left.pop(id, None)
                self.refused.pop(found.name, None)
                return
            self._push(seen, wire.encode(Notice(f"left out: {why}")), "notice")
        if isinstance(found, Lost) and isinstance(found.why, str):
            why = first_line(found.why[:300])
        self.refused[who] = why or "it answers a greeting with something else"
        if why is not None and why.startswith("its worker"):
            self._met.pop(seen.id, None)  # the next one may start

    def _misfit(self, seen: Seen, present: Present) -> str | None:
        """Why a node cannot be who it says, or None. It may have put anything into its answer."""
        counts = [present.num_examples, present.num_test, present.num_validation, *_values(present.domains)]
        if not isinstance(present.name, str) or present.name not in self.names:
            return STRANGER
        if self.registered and present.name != seen.name:
            return f"its key is that of {seen.name}, and it says that it is {present.name}"
        if any(type(n) is not int or not 0 <= n < 1 << 40 for n in counts):
            return "its numbers of examples are none"
        if not all(isinstance(x, str) for x in _values(present.facts)):
            return "what it says of itself is no text"
        other = self._nodes.get(self.names.index(present.name))
        if other is not None and other != seen:
            return f"there is another {present.name} already"
        return disagreement(self.facts, present.facts)

    # ---- an exchange ---------------------------------------------------------------------------------------------------

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        """See `fedlora.messages.Transport`. A client that cannot be reached is waited for, within what the settings allow."""
        waiting = {ask.client.id: ask for ask in asks}
        asked: dict[str, tuple[int, Seen]] = {}  # message -> whom, and the node that it went to
        tries, not_before, why = dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0.0), dict[int, str]()
        begun = time.monotonic()
        end, left = begun + 60 * self.settings.timeout, self._needed(asks)
        while waiting:
            self._look()
            now = time.monotonic()
            for message_id, (id, sent) in list(asked.items()):  # a node that was started anew has forgotten what it was asked
                if self._nodes.get(id) != sent:
                    del asked[message_id]
                    why[id] = "its node left"
            under_way = {id for id, _ in asked.values()}
            for id, ask in list(waiting.items()):
                if id in under_way or now < not_before[id]:
                    continue
                node = self._nodes.get(id)
                if node is None and now - max(begun, self._left.get(id, 0.0)) > 60 * self.settings.absence:
                    yield self._lost(waiting.pop(id), f"not connected{_because(why.get(id))}")
                elif node is not None and tries[id] > self.settings.retries:
                    yield self._lost(waiting.pop(id), why[id])
                elif node is not None:
                    if tries[id]:
                        self.carried.asked_again[self.names[id]] = why.get(id, "no answer")
                    tries[id] += 1
                    asked[self._push(node, wire.encode(ask), str(ask.round))] = id, node
            for message_id, (id, sent) in list(asked.items()):
                for message in self.grid.pull_messages([message_id]):
                    del asked[message_id]
                    answer = self._read(waiting[id], sent, message)
                    if isinstance(answer, str):
                        why[id], not_before[id] = answer, time.monotonic() + AGAIN
                        continue
                    left -= isinstance(answer.body, Reply)
                    del waiting[id]
                    yield answer
            late = f"later than the {len(asks) - len(waiting)} answers that were waited for"
            if waiting and left <= 0:
                yield from (self._lost(ask, late) for ask in waiting.values())
                return
            if waiting and time.monotonic() > end:
                said = f"no answer within {self.settings.timeout:g} minutes"
                yield from (self._lost(ask, said + _because(why.get(id))) for id, ask in waiting.items())
                return
            time.sleep(POLL)

    def close(self) -> None: ...

    def tell(self, text: str) -> None:
        """Say something to whoever is there, and wait a little until they have heard it."""
        told = {self._push(node, wire.encode(Notice(text)), "notice") for node in self._nodes.values()}
        end = time.monotonic() + GOODBYE
        while told and time.monotonic() < end:
            told -= {id for id in told if any(True for _ in self.grid.pull_messages([id]))}
            time.sleep(POLL)

    def _needed(self, asks: Sequence[Ask]) -> int:
        """How many replies end the wait for others."""
        if not any(isinstance(ask, TrainAsk) for ask in asks):
            return len(asks)
        return quorum(self.settings, len(asks))

    def _push(self, node: Seen, data: bytes, group: str) -> str:
        travels = pack(data)
        self.carried.down += len(travels)
        (id,) = self.grid.push_messages(
            [Message(content(travels), node.id, "query", group_id=group, ttl=60 * (self.settings.timeout + 60))]
        )
        if not isinstance(id, str):
            raise RuntimeError("Flower takes no message")
        return id

    def _bytes(self, message: Message, limit: int) -> bytes:
        """What a message holds. ValueError: why it holds nothing."""
        if message.has_error():
            raise ValueError(f"Flower says: {message.error.reason or message.error.code}")
        data = bytes_of(message.content)
        self.carried.up += len(data)
        return unpack(data, limit)

    def _read(self, ask: Ask, node: Seen, message: Message) -> Answer | str:
        """The answer in a message; or why there is none, which may be another time."""
        try:
            data = self._bytes(message, self.bound(ask))
            if message.metadata.src_node_id != node.id:
                raise ValueError("it comes from another node")
        except ValueError as error:
            return first_line(error)
        try:
            answer = wire.decode(data, self._classes, LARGEST_TREE)
        except ValueError as error:
            return self._lost(ask, f"it sent what cannot be read: {first_line(error)}")
        if isinstance(answer, Lost):
            return str(answer.why)[:300]
        if not isinstance(answer, Answer) or answer.client != ask.client.id or answer.envelope != ask.envelope:
            return self._lost(ask, "it answers something else than it was asked")
        return answer

    def _lost(self, ask: Ask, why: str) -> Answer:
        return Answer(ask.envelope, ask.client.id, Lost(why))


def quorum(settings: TransportConfig, asked: int) -> int:
    """Of so many who are asked, the oversampled ones among them, how many must have answered."""
    base = max(1, round(asked / (1 + settings.oversample)))
    wanted = settings.quorum if isinstance(settings.quorum, int) else -int(-settings.quorum * base // 1)
    return max(1, min(asked, wanted))


def _because(why: str | None) -> str:
    return f" ({why})" if why else ""


def _values(mapping: Any) -> Iterator[Any]:
    """The values of what should be a mapping; of what is none, something that no check lets through."""
    yield from mapping.values() if isinstance(mapping, Mapping) else [None]
