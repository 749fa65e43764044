"""The rounds of a federation, on the server: a kind of run as any other, whose clients are on machines of their own."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.clients.serve import classes
from fedlora.config import Config
from fedlora.disk import write_whole
from fedlora.errors import BadInput, RunFailed, first_line, some
from fedlora.gather.mean import Mean
from fedlora.listener import Listener, Passing, Row
from fedlora.messages import TEST, VALIDATION, Ask, ScoreAsk
from fedlora.models.load import Pretrained
from fedlora.names import counted
from fedlora.report.progress import Progress
from fedlora.runs.connect import Connection, Kind
from fedlora.runs.context import Played
from fedlora.runs.export import write_result
from fedlora.runs.federation import outline
from fedlora.runs.federation.folder import Federation, roster
from fedlora.runs.federation.outline import Outline, Outlined
from fedlora.runs.federation.session import ENDED, LOG, SESSION, STATUS, Session, read
from fedlora.runs.play import execute_kind
from fedlora.runs.prepare import (
    has_own_models,
    load_model,
    make_method,
    make_setup,
    make_task,
    refuse_unserved,
    versions,
    with_source,
)
from fedlora.runs.roster import Roster, read_roster
from fedlora.server.evaluate import Panel
from fedlora.server.loop import Federation as Rounds
from fedlora.server.loop import Server, envelopes
from fedlora.server.sampling import sampler
from fedlora.tasks.metrics import Metric, Scoring
from fedlora.training.trainer import Outlined as AnyOutlined
from fedlora.transforms import pipeline
from fedlora.transports.flower.link import SMALL, Link, quorum
from fedlora.types import Client, Method, asks_of


@dataclass(frozen=True, kw_only=True)
class FederationContext(Played):
    """What such a run works with."""

    outline: Outline
    pretrained: Pretrained | None


class Told(Passing):
    """Keeps status.json, which `fedlora federate status` reads, and says the same aloud."""

    def __init__(self, listener: Listener, file: Path, names: Sequence[str], rounds: int) -> None:
        super().__init__(listener)
        self.file, self.names = file, list(names)
        self.said: dict[str, Any] = {
            "pid": os.getpid(),
            "rounds": rounds,
            "round": 0,
            "clients": dict.fromkeys(names, "not seen yet"),
        }
        self._known: dict[str, str] = {}

    def stage(self, text: str) -> None:
        self._say(stage=text)
        super().stage(text)

    def begin(self, first: int, last: int, clients: int, metric: Metric) -> None:
        self._say(stage="training", round=first)
        super().begin(first, last, clients, metric)

    def round(self, row: Row) -> bool | None:
        self._say(round=row["round"])
        found = super().round(row)
        for id, why in row.get("failures", {}).items():
            super().note(f"round {row['round']}, {self.names[int(id)]}: {why}")
        return found

    def clients(self, link: Link) -> None:
        """Something has changed with who is there."""
        now = dict.fromkeys(link.names, "not seen yet")
        for id, present in link.present.items():
            there = id in link.connected
            now[link.names[id]] = f"{'connected' if there else 'away'}, {counted(present.num_examples, 'example')}"
        now |= {name: f"left out: {why}" for name, why in link.refused.items() if not now.get(name, "").startswith("connected")}
        for name, state in now.items():
            if self._known.get(name) != state and state != "not seen yet":
                super().note(f"{name}: {state}")
        self._known = now
        self._say(clients=now)

    def _say(self, **what: Any) -> None:
        self.said |= what
        write_whole(self.file, json.dumps(self.said, indent=1).encode())


def play(grid: Any) -> None:
    """Play a federation over Flower's grid, as the session says that its operator started."""
    session = read(Path(os.environ[SESSION]))
    server = Federation(Path(session.federation)).server
    ended: dict[str, Any] = {"status": 0, "error": ""}
    with open(server / LOG, "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            run(session, grid)
        except (BadInput, RunFailed) as error:
            ended = {"status": 2 if isinstance(error, BadInput) else 1, "error": str(error)}
        write_whole(server / ENDED, json.dumps(ended).encode())


def run(session: Session, grid: Any, listener: Listener | None = None) -> dict[str, Any]:
    """Play, or go on with, a federation; returns the summary."""
    federation, out = Federation(Path(session.federation)), Path(session.out)
    config = federation.config
    if session.model is not None:
        config = with_source(config, session.model)
    expected = outline.read(federation)
    names = config.clients.names or []
    method, settings = make_method(config), config.transport
    federation.server.mkdir(exist_ok=True)
    told = Told(listener or Progress(quiet=False), federation.server / STATUS, names, config.train.rounds)
    bound = _bound(method, expected, make_task(config).bind(expected.schema))
    link = Link(grid, names, expected.facts, classes(method), settings, bound, session.registered, told.clients)
    kind = Kind(
        prepare=lambda place: _prepare(config, federation, expected, link, told, place, session.model is not None),
        picture=lambda context, place: None,
        connected=lambda context, out, incarnation, listener: _connected(context, link, incarnation),
        write=_write,
        held_out=lambda context, connection, server: {},
    )
    try:
        summary = execute_kind(config, kind, out, session.resume, told)
    except (BadInput, RunFailed) as error:
        link.tell(f"it has stopped: {first_line(error)}")
        raise
    link.tell(f"all is done, after {counted(summary['rounds'], 'round')}")
    return summary


def _prepare(
    config: Config, federation: Federation, expected: Outline, link: Link, listener: Told, place: Path, weights: bool
) -> FederationContext:
    """Everything but the clients' answers. On --resume the clients are those that the run began with.

    Args:
        weights: the server has the model's, too.
    """
    method, task = make_method(config), make_task(config)
    refuse_unserved(config, task)
    transforms = pipeline.make(config.transform, method, config.seed, config.model.head)
    if weights:
        loaded = load_model(config, task, expected.schema, listener)
        trainer: AnyOutlined = loaded.trainer
        pretrained = None
        theirs = outline.facts(config, expected.schema, loaded)
        if theirs != expected.facts:
            raise BadInput(f"--model {config.model.source}: it is not the model that the federation was set up with")
    else:
        listener.stage("reading the model's outline")
        pretrained = outline.pretrained_of(config, federation, expected)
        trainer = Outlined(expected, task.bind(expected.schema, pretrained))
    names, file = config.clients.names or [], place / "federation.json"
    known = read_roster(file) if file.is_file() else None
    clients = tuple(known.clients if known else roster(config))
    method.init(make_setup(config, trainer, [replace(c, num_examples=1) for c in clients]))  # refuses before anybody works
    listener.stage(f"waiting for {len(names)} clients")
    missing = link.wait([c.id for c in clients if known is None or c.num_examples], config.transport.start)
    if missing:
        present = len(names) - len(missing)
        if known is None and present < quorum(config.transport, len(names)):
            raise RunFailed(_too_few(config, link, missing))
        listener.note(f"not there yet: {some([names[id] for id in missing])}; they can come in any later round")
    if known is None:
        clients = tuple(_as_present(client, link) for client in clients)
    tests = [link.present[c.id].num_test if c.id in link.present else 0 for c in clients]
    made = Roster(
        expected.schema,
        clients,
        tuple(names),
        tuple(tests),
        trainer.objective.metrics,
        modules=tuple(trainer.shapes),
        rows=trainer.rows,
        max_length=expected.max_length,
        padding=expected.padding,
    )
    return FederationContext(
        config=config,
        method=method,
        transforms=transforms,
        setup=make_setup(config, trainer, clients),
        trainer=trainer,
        roster=known or made,
        outline=expected,
        pretrained=pretrained,
    )


def _too_few(config: Config, link: Link, missing: Sequence[int]) -> str:
    names = config.clients.names or []
    why = "".join(f"; {name}: {reason}" for name, reason in sorted(link.refused.items()))
    return f"not there within {config.transport.start:g} minutes: {some([names[id] for id in missing], 10)}{why}"


def _as_present(client: Client, link: Link) -> Client:
    """A client with what it says that it has; one that is not there has nothing, and is not asked."""
    found = link.present.get(client.id)
    return client if found is None else replace(client, num_examples=found.num_examples, domains=dict(found.domains))


@contextmanager
def _connected(context: FederationContext, link: Link, incarnation: int) -> Iterator[Connection]:
    """The run while its clients can be reached."""
    setup, config = context.setup, context.config
    sample, more = config.clients.sample, 1 + config.transport.oversample
    drawn = min(len(setup.clients), math.ceil(sample * more)) if isinstance(sample, int) else min(1.0, sample * more)

    def participants(round: int) -> Sequence[Client]:
        """Of those that ever were there, what they said last being what they have."""
        return sampler([_as_present(c, link) for c in setup.clients if c.id in link.present], setup.seed, drawn)(round)

    def noticed() -> Mapping[str, Any]:
        carried, link.carried = link.carried, type(link.carried)()
        found: dict[str, Any] = {"transport_up_bytes": carried.up, "transport_down_bytes": carried.down}
        return found | ({"asked_again": carried.asked_again} if carried.asked_again else {})

    gather = Mean(context.method, setup, context.transforms)
    rounds = Rounds(context.method, setup, link, gather, participants, envelopes(incarnation), config.transport.retries)
    panel = Panel(Scored(setup.clients, link), has_own_models(config), link, context.trainer.objective)
    try:
        yield Connection((), rounds, panel, incarnation, noticed=noticed)
    finally:
        link.close()


class Scored(Mapping[str, Sequence[Client]]):
    """Who has examples to be scored on, of those that are there by now."""

    def __init__(self, clients: Sequence[Client], link: Link) -> None:
        self._clients, self._link = clients, link

    def _found(self) -> dict[str, list[Client]]:
        own = [(client, self._link.present[client.id]) for client in self._clients if client.id in self._link.present]
        test, validation = [c for c, said in own if said.num_test], [c for c, said in own if said.num_validation]
        return {TEST: test} | ({VALIDATION: validation} if validation else {})

    def __getitem__(self, part: str) -> Sequence[Client]:
        return self._found()[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


def _write(context: FederationContext, server: Server, rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Any]:
    deployed = context.method.deploy(server.state)
    where = write_result(context.config, context.roster, deployed, server.head, rows, out, outlined=context.pretrained)
    model = {"adapted_layers": len(context.outline.shapes), "weights_on_the_server": context.pretrained is None}
    return {"result": where, "model": model, "versions": versions(False)}


def _bound(method: Method, expected: Outline, scoring: Scoring) -> Callable[[Ask], int]:
    """Ask -> the most bytes that its answer can have: all that a client of its rank could send as fp64, four times over."""
    sides = sum(o + i for o, i in expected.shapes.values())
    fixed = sum(x.numel() for x in expected.head.values())
    if "full" in asks_of(method):
        fixed += sum(math.prod(shape) for shape in expected.params.values())
    scores = sum(x.nbytes for x in scoring.zeros().values())

    def bound(ask: Ask) -> int:
        return 4 * SMALL + (4 * scores if isinstance(ask, ScoreAsk) else 4 * 8 * (ask.client.rank * sides + fixed))

    return bound
