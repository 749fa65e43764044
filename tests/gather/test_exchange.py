"""Answers in the wrong envelope, and workers that are behind or forgot."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
import torch
from served import rounds
from toy import Trainer, federate, make_clients, make_setup, play, same

from fedlora.gather.exchange import answers
from fedlora.gather.gather import RoundCounts
from fedlora.gather.mean import Mean
from fedlora.messages import Answer, Behind, Body, Envelope, Forgot, Lost, Scored, TrainAsk
from fedlora.methods.fedit import FedIT
from fedlora.methods.flora import FLoRA
from fedlora.server.loop import Server
from fedlora.types import Client, Reply

CLIENTS = [Client(k, 2, 10) for k in range(4)]
ASKS = [TrainAsk(3, client, f"down {client.id}", held=2, best=1) for client in CLIENTS]


@dataclass
class Script:
    """Answers that are made of the asks of each exchange."""

    play: Any
    asks: list[Sequence[TrainAsk]] = field(default_factory=list)

    def exchange(self, asks: Sequence[TrainAsk]) -> Iterator[Answer]:
        self.asks.append(asks)
        return iter(self.play(len(self.asks), asks))

    def close(self) -> None: ...


def replies(asks: Sequence[TrainAsk]) -> list[Answer]:
    return [Answer(ask.envelope, ask.client.id, Reply(ask.client, f"{ask.down}, held {ask.held}")) for ask in asks]


def asked(script: Script, again: Any = None) -> dict[int, Body]:
    envelopes = (Envelope(5, n) for n in count(1))
    found = list(answers(ASKS, script, envelopes, again))
    assert len(found) == len({ask.client.id for ask, _ in found})
    return {ask.client.id: body for ask, body in found}


@pytest.mark.parametrize("change", [{"exchange": 7}, {"incarnation": 4}], ids=str)
def test_an_answer_in_another_envelope_is_none(change: dict[str, int]) -> None:
    def scripted(turn: int, asks: Sequence[TrainAsk]) -> list[Answer]:
        good = replies(asks)
        return [replace(good[0], envelope=replace(good[0].envelope, **change)), *good[1:]]

    assert sorted(asked(Script(scripted))) == [1, 2, 3]


def test_of_two_answers_the_first_counts_and_of_strangers_none() -> None:
    def scripted(turn: int, asks: Sequence[TrainAsk]) -> list[Any]:
        good = replies(asks)
        other = Answer(asks[0].envelope, 0, Lost("no"))
        return ["hello", Answer(asks[0].envelope, 77, Lost("no")), *good, other, *good]

    found = asked(Script(scripted))
    assert sorted(found) == [0, 1, 2, 3] and all(isinstance(body, Reply) for body in found.values())


@pytest.mark.parametrize(
    "change",
    [
        {"client": [0]},
        {"client": torch.tensor(0)},
        {"client": False},
        {"envelope": None},
        {"envelope": Envelope(5, torch.ones(2))},
        {"body": Behind("3")},
        {"body": Behind(None)},
        {"body": Lost(7)},
    ],
    ids=str,
)
def test_an_answer_that_no_worker_would_give_is_none(change: dict[str, Any]) -> None:
    """Bytes that decode may hold anything in any field."""

    def scripted(turn: int, asks: Sequence[TrainAsk]) -> list[Answer]:
        good = replies(asks)
        return [replace(good[0], **change), *good[1:]]

    assert sorted(asked(Script(scripted))) == [1, 2, 3]


def test_who_is_behind_or_forgot_is_asked_once_more_in_another_envelope() -> None:
    def scripted(turn: int, asks: Sequence[TrainAsk]) -> list[Answer]:
        if turn == 1:
            first, second, *others = replies(asks)
            return [replace(first, body=Behind(4)), *others, replace(second, body=Forgot())]
        return [Answer(ask.envelope, ask.client.id, Forgot()) if ask.client.id else replies([ask])[0] for ask in asks]

    heard: list[Any] = []

    def again(ask: TrainAsk, why: Any) -> TrainAsk:
        heard.append((ask.client.id, why))
        return replace(ask, down="all", held=0 if why == Forgot() else ask.held)

    script = Script(scripted)
    found = asked(script, again)
    assert heard == [(0, Behind(4)), (1, Forgot())] and len(script.asks) == 2
    assert [ask.envelope for asks in script.asks for ask in asks] == [Envelope(5, 1)] * 4 + [Envelope(5, 2)] * 2
    assert found[0].up == "all, held 2" and found[1] == Forgot()  # it is not asked for ever


def collected(bodies: dict[int, Any]) -> RoundCounts:
    setup = make_setup(make_clients((2,) * 4))
    method, counts = FedIT(), RoundCounts()
    state = method.init(setup)
    asks = [TrainAsk(1, client, method.send(state, client, 1)) for client in setup.clients]
    script = Script(lambda turn, asks: [Answer(ask.envelope, ask.client.id, bodies[ask.client.id]) for ask in asks])
    counts.accepted = [
        reply.client.id
        for reply in Mean(method, setup).collect(state, asks, script, iter([Envelope(1, 1), Envelope(1, 2)]), counts)
    ]
    return counts


def test_what_is_no_reply_is_refused_or_lost_by_name() -> None:
    setup = make_setup(make_clients((2,) * 4))
    good = federate(FedIT(), setup, 1).rounds[1][3][1]
    counts = collected({0: Scored({}), 1: Lost("its worker died\nand more"), 2: Forgot(), 3: good})
    assert counts.refused == {0: "it answers with Scored", 2: "it answers with Forgot"}
    assert counts.lost == {1: "its worker died"} and counts.accepted == [3] and counts.forgotten == [2]


@dataclass
class Remote:
    """Workers that play each client by itself, and begin without anything in some rounds: of the base, or of what they kept."""

    method: Any
    setup: Any
    behind: frozenset[int] = frozenset()
    forgot: frozenset[int] = frozenset()
    topped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trainer = Trainer(self.setup)
        self.kept = {(c.id, 0): self.method.hold(self.setup, c) for c in self.setup.clients}

    def exchange(self, asks: Sequence[TrainAsk]) -> Iterator[Answer]:
        lost = {ask.client.id for ask in asks if (ask.client.id, ask.held) not in self.kept}
        if asks[0].round in self.behind | self.forgot and asks[0].round not in self.topped:
            self.topped.append(asks[0].round)
            self.trainer.base.clear()
            self.trainer.merged.clear()
            if asks[0].round in self.forgot:
                lost = {ask.client.id for ask in asks if ask.held}
                self.kept = {key: held for key, held in self.kept.items() if key[1] == 0}
            for ask in asks:
                body: Body = Forgot() if ask.client.id in lost else Behind(0)
                yield Answer(ask.envelope, ask.client.id, body)
            return
        for ask in asks:
            id = ask.client.id
            up, self.kept[id, ask.round] = play(self.method, self.trainer, ask.down, self.kept[id, ask.held], ask.client, ask.round)
            yield Answer(ask.envelope, id, Reply(ask.client, up))

    def close(self) -> None: ...


@pytest.mark.parametrize("trouble", [{"behind": frozenset({2, 4})}, {"forgot": frozenset({3})}], ids=str)
def test_who_lost_its_base_or_all_it_had_is_sent_it_and_trains_to_the_same(trouble: dict[str, Any]) -> None:
    """FLoRA: every round is merged into the base, and clients keep nothing else."""
    setup = make_setup(make_clients((1, 2, 4, 2)), rounds=4)
    ends = []
    for remote in (Remote(FLoRA(), setup), Remote(FLoRA(), setup, **trouble)):
        *_, (server, counts, _) = rounds(FLoRA(), setup, Server(0, FLoRA().init(setup)), remote, lambda t: setup.clients)
        assert not counts.failed
        ends.append((server, remote))
    assert same(ends[0][0].state, ends[1][0].state) and ends[1][1].topped == sorted(next(iter(trouble.values())))
