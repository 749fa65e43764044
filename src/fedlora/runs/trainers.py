"""Runs whose clients bring trainers of their own: a `transformers.Trainer` each, with its model, data and arguments.

The server, its rounds, the folder and the records are those of every run; a client is a worker of its own, with its trainer in it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora import methods
from fedlora.clients.state import StateStore
from fedlora.clients.watch import LocalUpdate
from fedlora.clients.worker import Examples, Worker
from fedlora.config import Config, HeadMode, as_tables, resolve
from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput, first_line, some
from fedlora.gather.mean import Mean
from fedlora.listener import Listener
from fedlora.messages import TEST
from fedlora.models.peft import one_slot
from fedlora.runs.connect import Connection, Kind
from fedlora.runs.context import Played
from fedlora.runs.export import read_result, which_client
from fedlora.runs.packages import require
from fedlora.runs.prepare import has_own_models, make_method, make_setup, versions
from fedlora.runs.roster import Roster
from fedlora.runs.saved import STATES
from fedlora.server.evaluate import Panel
from fedlora.server.loop import Federation, Server, envelopes
from fedlora.server.sampling import sampler
from fedlora.tables import merge, nested
from fedlora.training.hf import HFTrainer
from fedlora.transforms import pipeline
from fedlora.transports.inprocess import EachItsOwn
from fedlora.types import Client, Factors, Model, Tensors, asks_of, own_model
from fedlora.wire import message_classes

GIVEN = "given:"  # before what was given in Python
NOTHING = Encoded((), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))  # examples are the trainer's own
FREE = {"train.rounds", "train.evaluate_every", "train.trainer", "clients.sample", "model.head"}  # keys that no trainer decides on
TABLES = ("task", "model", "data", "clients", "train")


@dataclass(frozen=True)
class TrainerClient:
    """A client with a trainer of its own."""

    name: str
    hf: HFTrainer


@dataclass(frozen=True, kw_only=True)
class TrainersContext(Played):
    """What such a run works with; `own` by the client's id."""

    own: Mapping[int, TrainerClient]

    @property
    def scored(self) -> list[Client]:
        """Who has examples to be scored on."""
        return [client for client in self.setup.clients if self.own[client.id].hf.num_scored]


def as_client(trainer: Any, name: str) -> TrainerClient:
    """A trainer as a client. BadInput: why it cannot be one."""
    return TrainerClient(name, HFTrainer(trainer, f"client {name}".rstrip()))


def joined(config: Config, listener: Listener, clients: Sequence[TrainerClient]) -> tuple[Config, Kind[TrainersContext]]:
    """The configuration as the clients' trainers complete it, and how such a run is played.

    Args:
        clients: where they are at hand; else `train.trainer` makes them.
    """
    clients = clients or made(config)
    for each in clients:
        each.hf.whose = f"client {each.name}"
    config = completed(config, clients)
    return config, Kind(
        prepare=lambda place: _prepare(config, listener, clients),
        picture=lambda context, place: None,
        connected=_connected,
        write=_write,
        held_out=lambda context, connection, server: {},
    )


def made(config: Config) -> list[TrainerClient]:
    """The clients that `train.trainer` makes. BadInput: why it makes none."""
    name, count = config.train.trainer or "", config.clients.count
    key = f"train.trainer = '{name}'"
    if name.startswith(GIVEN) or ":" not in name:
        again = (
            "its trainers were given in Python; give them again: fedlora.run(data=[fedlora.client(...), ...], out=..., resume=True)"
        )
        raise BadInput(f"{key}: {again if name.startswith(GIVEN) else 'a function is named package.module:function'}")
    if count is None:
        raise BadInput(f"{key} needs clients.count: how many clients it makes a trainer for")
    module, _, attribute = name.partition(":")
    try:
        make: Callable[[str], Any] = getattr(import_module(module), attribute)
        found = [(f"client-{i}", make(f"client-{i}")) for i in range(count)]
    except Exception as error:  # somebody's program, which may fail in any way
        raise BadInput(f"{key}: {first_line(error)}") from error
    return [as_client(trainer, each) for each, trainer in found]


def completed(config: Config, clients: Sequence[TrainerClient]) -> Config:
    """The configuration with what the trainers decide on. BadInput where it says otherwise."""
    _require_alike(clients)
    hf, names = clients[0].hf, [each.name for each in clients]
    peft = hf.adapter.config
    targets = peft.target_modules
    base = str(getattr(peft, "base_model_name_or_path", None) or "")
    theirs: dict[str, Any] = {
        "model.source": base or f"{GIVEN}{hf.trainer.model.config.model_type}",
        "model.target_modules": targets if isinstance(targets, str) else sorted(targets),
        "model.lora_alpha": hf.lora_alpha,
        "model.rslora": hf.rslora,
        "clients.count": len(clients),
        "clients.rank": [each.hf.rank for each in clients],
        "data.source": f"{GIVEN}{some(names, 3)}",
    }
    if hf.head and config.model.head is HeadMode.FROZEN:
        theirs["model.head"] = HeadMode.SHARED.value
    tables, plain = as_tables(config), as_tables(Config())
    for table in TABLES:
        for name, value in tables[table].items():
            key = f"{table}.{name}"
            if key not in FREE and value not in (plain[table].get(name), theirs.get(key)):
                said = f"which says {theirs[key]!r}" if key in theirs else "which decides on it"
                raise BadInput(f"{key} = {value!r}: clients have trainers of their own, {said}; leave it out here")
    return resolve(merge(tables, *(nested(key, value) for key, value in theirs.items())))


def _require_alike(clients: Sequence[TrainerClient]) -> None:
    """BadInput where clients cannot share an adapter."""
    twice = [each.name for i, each in enumerate(clients) if each.name in [other.name for other in clients[:i]]]
    if twice:
        raise BadInput(f"two clients are called {twice[0]}; give each a name: fedlora.client(trainer, name=...)")
    known: dict[int, Any] = {}
    first, digests = clients[0], dict[int, dict[str, str]]()
    for each in clients:
        # Who shares a model shares what is merged into it.
        each.hf.adapter = known.setdefault(id(each.hf.trainer.model), each.hf.adapter)
        digests.setdefault(id(each.hf.adapter), _digests(each.hf))
        for (what, a), b in zip(_agreed(first.hf).items(), _agreed(each.hf).values(), strict=True):
            if a != b:
                raise BadInput(
                    f"clients {first.name} and {each.name} differ in their {what}: {_short(a)} and {_short(b)}; all must agree"
                )
        one, other = digests[id(first.hf.adapter)], digests[id(each.hf.adapter)]
        off = next((m for m in one if one[m] != other[m]), None)
        if off is not None:
            raise BadInput(f"clients {first.name} and {each.name} have other base models: the weights of {off} differ")


def _agreed(hf: HFTrainer) -> dict[str, Any]:
    """What all clients must have in common, but for their base model's weights."""
    return {
        "lora_alpha": hf.lora_alpha,
        "use_rslora": hf.rslora,
        "adapted layers": list(hf.shapes),
        "shapes of layers": list(hf.shapes.values()),
        "modules_to_save": {name: tuple(x.shape) for name, x in hf.head.items()},
    }


def _short(value: Any) -> str:
    return str(value) if len(str(value)) <= 80 else f"{str(value)[:77]}..."


def _digests(hf: HFTrainer) -> dict[str, str]:
    """Adapted layer -> the digest of its own weight, as the trainer came with it."""
    hf.adapter.fold(Model().base)

    def of(x: torch.Tensor) -> str:
        data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return blake2b(data.data, digest_size=8).hexdigest()

    return {m: of(hf.adapter.weight(m)) for m in hf.shapes}


def _prepare(config: Config, listener: Listener, clients: Sequence[TrainerClient]) -> TrainersContext:
    """Check everything that can be wrong before training starts."""
    require(config)
    method, first = make_method(config), clients[0].hf
    _refuse_method(method, first)
    transforms = pipeline.make(config.transform, method, config.seed, config.model.head)
    everybody = tuple(Client(i, each.hf.rank, each.hf.num_examples) for i, each in enumerate(clients))
    setup = make_setup(config, first, everybody)
    method.init(setup)  # refuses what it cannot do
    for each in clients:
        if any(bool(B.any()) for B in each.hf.adapter.read().B.values()):
            listener.note(f"the adapter of {each.name} has been trained before: the run starts from a fresh one")
    if not any(each.hf.num_scored for each in clients):
        listener.note("no trainer has an eval_dataset, so there is no score, and rows have the training loss alone")
    num_test = tuple(each.hf.num_scored for each in clients)
    names = tuple(each.name for each in clients)
    roster = Roster(Schema(), everybody, names, num_test, first.objective.metrics, modules=tuple(first.shapes), rows=first.rows)
    return TrainersContext(
        config=config,
        method=method,
        transforms=transforms,
        setup=setup,
        trainer=first,
        roster=roster,
        own=dict(enumerate(clients)),
    )


def _refuse_method(method: Any, hf: HFTrainer) -> None:
    """BadInput where a method asks for more than a PEFT model can do."""
    lacks = hf.refuses(asks_of(method))
    if lacks:
        fit = [name for name in methods.names() if not hf.refuses(asks_of(methods.make(name, {})))]
        raise BadInput(
            f"{method.FACTS.title} needs {some(lacks, 4)}, and a transformers.Trainer with a PEFT adapter has none; possible: "
            f"{', '.join(fit)}"
        )


@contextmanager
def _connected(context: TrainersContext, out: Path, incarnation: int, listener: Listener) -> Iterator[Connection]:
    """The run in `out`, its clients in this process."""
    watched: dict[int, LocalUpdate] = {}

    def watch(update: LocalUpdate) -> None:
        watched[update.id] = update

    states = StateStore(out / STATES, message_classes(context.method))
    workers = {client.id: worker(context, client, states, listener.examples, watch) for client in context.setup.clients}
    transport = EachItsOwn(workers)
    participants = sampler(context.setup.clients, context.setup.seed, context.config.clients.sample)
    gather = Mean(context.method, context.setup, context.transforms)
    federation = Federation(context.method, context.setup, transport, gather, participants, envelopes(incarnation))
    panel = Panel({TEST: context.scored}, has_own_models(context.config), transport, context.trainer.objective)
    yield Connection(tuple(workers.values()), federation, panel, incarnation, watched)


def worker(
    context: TrainersContext,
    client: Client,
    states: StateStore,
    on_examples: Callable[[int], None] = lambda n: None,
    watch: Callable[[LocalUpdate], None] = lambda update: None,
) -> Worker:
    """What plays one client: the same behind every transport."""
    hf = context.own[client.id].hf
    setup = replace(context.setup, clients=(client,), base=hf.base_weight)
    examples = {client.id: Examples(NOTHING, {TEST: NOTHING})}
    head = context.config.model.head
    return Worker(context.method, setup, hf, examples, head, states, context.transforms, on_examples, watch)


def _write(context: TrainersContext, server: Server, rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Any]:
    """Write the common model as an adapter, and leave in each trainer's model the client's own, or that."""
    deployed = one_slot(context.method.deploy(server.state))
    _save(context.own[0].hf, deployed, server.head, out / "adapter")
    for client in context.setup.clients:
        slot, head = deployed, server.head
        if client.id in server.accepted and has_own_models(context.config):
            slot, head = _own(context, server, client, out)
        context.own[client.id].hf.load(slot, head)
    hf = context.own[0].hf
    model = {"trainer": type(hf.trainer).__name__, "model": type(hf.adapter.model).__name__}
    return {"result": "adapter", "model": model, "versions": versions(not hf.adapter.can_merge)}


def _own(context: TrainersContext, server: Server, client: Client, out: Path) -> tuple[Factors, Tensors]:
    kept = StateStore(out / STATES, message_classes(context.method)).get(client.id, server.accepted[client.id])
    assert kept is not None
    return one_slot(own_model(context.method, server.state, kept.held, client, server.round + 1)), kept.head or server.head


def _save(hf: HFTrainer, slot: Factors, head: Tensors, to: Path) -> None:
    """Built beside its place and renamed, so that it is never half there."""
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    hf.load(slot, head)
    hf.save(part)
    shutil.rmtree(to, ignore_errors=True)
    part.rename(to)


def show(run: Path, clients: Sequence[TrainerClient], client: int | str | None = None) -> TrainerClient:
    """The client whose trainer's model then is what a run has learned: everybody's in the first one, or a client's own.

    Raises:
        BadInput: the trainers are not at hand, or there is no such client or no such model.
    """
    id = None if client is None else which_client(run, client)
    config, _, result, head = read_result(run, id)
    found = (clients or made(config))[id or 0]
    found.hf.load(one_slot(result), head)
    return found


def export(run: Path, to: Path, clients: Sequence[TrainerClient], client: int | str | None, merged: bool) -> None:
    """Write what a run has learned as an adapter, everybody's or a client's own, into a folder that is not there. BadInput: see
    `show`."""
    if merged:
        raise BadInput("merged: the model is in a client's trainer; run.model().merge_and_unload() of PEFT gives it whole")
    if client is None and (run / "adapter").is_dir():
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run / "adapter", to)
        return
    show(run, clients, client).hf.save(to)
