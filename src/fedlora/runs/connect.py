"""How a run reaches its clients: the worker that plays them here, and what is scored where."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from fedlora.clients.state import StateStore
from fedlora.clients.watch import LocalUpdate
from fedlora.clients.worker import Examples, Worker
from fedlora.config import HeadMode
from fedlora.data.dataset import Integers
from fedlora.data.encoded import Encoded
from fedlora.data.partition import Parts
from fedlora.gather.mean import Mean
from fedlora.listener import Listener, Quiet
from fedlora.messages import SERVER, TEST, VALIDATION, Transport
from fedlora.runs.context import Played, RunContext
from fedlora.runs.prepare import has_own_models
from fedlora.runs.saved import STATES
from fedlora.server.evaluate import SERVER_CLIENT, Panel, all_scores, common_asks, score
from fedlora.server.loop import Federation, Server, envelopes
from fedlora.server.sampling import sampler
from fedlora.training.length import lr_factor
from fedlora.transports.inprocess import InProcess
from fedlora.types import Client, Tensors
from fedlora.wire import message_classes

QUIET = Quiet()
# To where clients are: the worker here, or others of the run in a folder. The listener hears what befalls them.
Connect = Callable[[RunContext, Worker, Path, Listener], Transport]


def in_process(context: RunContext, worker: Worker, out: Path, listener: Listener) -> Transport:
    """All clients are played here."""
    return InProcess(worker)


@dataclass(frozen=True)
class Connection:
    """What a run's server reaches.

    Attributes:
        workers: those in this process: one, which plays the server's own data, and all clients where there is no other; or one
            for each client, where clients have trainers of their own. They share what clients keep.
        incarnation: how often the server has been started.
        watched: what training did to the first clients that were played here, since this was cleared.
        noticed: what else a round's row says of how it went, since this was last asked.
    """

    workers: tuple[Worker, ...]
    federation: Federation
    panel: Panel
    incarnation: int
    watched: dict[int, LocalUpdate] = field(default_factory=dict)
    noticed: Callable[[], Mapping[str, Any]] = dict


C = TypeVar("C", bound=Played)


@dataclass(frozen=True)
class Kind(Generic[C]):
    """What differs between runs: fedlora deals data and trains itself, or clients bring trainers of their own.

    Attributes:
        prepare: run's folder, or the place where it is built -> what the run works with. It checks all that can be wrong.
        picture: draws who holds what into the run's folder.
        connected: context, folder, the incarnation, a listener -> the run while its clients can be reached.
        write: writes the result of a server, of whose rounds these are the rows, into the folder; what the summary says of it.
        held_out: what the summary says of clients that never trained.
    """

    prepare: Callable[[Path], C]
    picture: Callable[[C, Path], None]
    connected: Callable[[C, Path, int, Listener], AbstractContextManager[Connection]]
    write: Callable[[C, Server, Sequence[Mapping[str, Any]], Path], dict[str, Any]]
    held_out: Callable[[C, Connection, Server], Mapping[str, Any]]


@contextmanager
def connected(
    context: RunContext, out: Path | None, incarnation: int = 1, listener: Listener = QUIET, connect: Connect = in_process
) -> Iterator[Connection]:
    """The run in `out`, connected to its clients, who can be reached meanwhile; without `out` nothing is left of it."""
    watched: dict[int, LocalUpdate] = {}

    def watch(update: LocalUpdate) -> None:
        watched[update.id] = update

    worker = make_worker(context, out and out / STATES, 0, listener.examples, watch)
    transport = connect(context, worker, out or worker.states.folder, listener)
    try:
        gather = Mean(context.method, context.setup, context.transforms)
        participants = sampler(context.setup.clients, context.setup.seed, context.config.clients.sample)
        federation = Federation(context.method, context.setup, transport, gather, participants, envelopes(incarnation))
        yield Connection((worker,), federation, make_panel(context, InProcess(worker), transport), incarnation, watched)
    finally:
        transport.close()


def make_worker(
    context: RunContext,
    states: Path | None,
    number: int,
    on_examples: Callable[[int], None] = lambda n: None,
    watch: Callable[[LocalUpdate], None] = lambda update: None,
) -> Worker:
    """A worker of a run, which can play each of its clients, and the server's own data.

    Args:
        states: the folder of what clients keep; None is a temporary one.
        number: of the worker, among those that share the folder.
    """
    store = StateStore(states, message_classes(context.method), number)
    head = context.config.model.head
    owned = examples(context)
    factor = partial(lr_factor, context.config.train)
    return Worker(
        context.method, context.setup, context.trainer, owned, head, store, context.transforms, on_examples, watch, factor
    )


def make_panel(context: RunContext, local: Transport, transport: Transport) -> Panel:
    """What the run's models are scored on: by clients, where they end with models of their own, else by the worker here."""
    own = has_own_models(context.config)
    owned = {TEST: context.parts.test} | ({VALIDATION: context.parts.validation} if context.validation else {})
    clients = {
        part: [client for client in context.setup.clients if len(where[client.id])] if own else [SERVER_CLIENT]
        for part, where in owned.items()
    }
    return Panel(clients, own, transport if own else local, context.trainer.objective)


def score_held_out(context: RunContext, connection: Connection, server: Server) -> dict[str, Any]:
    """What a summary says of the clients that never trained: how good for them is the model that they would be given."""
    scored = [client for client in context.held_out if len(context.parts.test[client.id])]
    panel = replace(connection.panel, clients={TEST: scored}, own=False, transport=connection.federation.transport)
    asks = common_asks(connection.federation, server, TEST, scored)
    found = score(connection.federation, server, asks, panel)
    scoring, sums, first = panel.scoring, found.total, len(context.setup.clients)
    names = {client.id: context.roster.held_out[client.id - first].name for client in scored}
    return {
        "clients": len(found.sums),
        "examples": scoring.count(sums),
        **all_scores(scoring, sums),
        f"client_{scoring.metrics[0].name}": {names[id]: score for id, score in found.by_client.items()},
    } | ({"clients_not_scored": [names[id] for id in found.lost]} if found.lost else {})


def initial_head(context: Played) -> Tensors:
    """The head that travels: where it is shared, the seed's."""
    return context.trainer.head if context.config.model.head is HeadMode.SHARED else {}


def examples(context: RunContext) -> dict[int, Examples]:
    """What each client has, the server among them."""
    nothing = context.test.take(np.zeros(0, dtype=np.int64))
    parts = {TEST: context.test} | ({VALIDATION: context.validation} if context.validation else {})
    owned = {TEST: context.parts.test, VALIDATION: context.parts.validation}
    objective = context.trainer.objective
    trained = _without_held_out(context.parts, context.parts.train, len(context.all_train))
    everybody = objective.constant(context.all_train.take(trained))

    def part_of(client: Client) -> dict[str, Encoded]:
        return {name: part.take(owned[name][client.id]) for name, part in parts.items()}

    servers = parts
    if context.validation:  # it chooses the round, which held-out clients must have no say in
        chosen = _without_held_out(context.parts, context.parts.validation, len(context.validation))
        servers = parts | {VALIDATION: context.validation.take(chosen)}
    found = {SERVER: Examples(nothing, servers, everybody)}
    found |= {client.id: Examples(nothing, part_of(client), everybody) for client in context.held_out}
    own = has_own_models(context.config)
    for client in context.setup.clients:
        if own:
            constant = objective.constant(context.train[client.id], everybody)
            found[client.id] = Examples(context.train[client.id], part_of(client), constant)
        else:
            found[client.id] = Examples(context.train[client.id])
    return found


def _without_held_out(parts: Parts, owned: Sequence[Integers], count: int) -> Integers:
    """The rows of a part, which has so many, but for those that only held-out clients have."""
    first, none = len(parts.names) - parts.held_out, np.zeros(0, dtype=np.int64)
    alone = np.setdiff1d(np.concatenate([none, *owned[first:]]), np.concatenate([none, *owned[:first]]))
    return np.setdiff1d(np.arange(count), alone)
