"""A whole run in one process: from a configuration to a run folder, resumable at any moment."""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedlora.config import Config, Head, as_tables, resolve, to_toml
from fedlora.data.dataset import Dataset
from fedlora.data.load import load as load_data
from fedlora.data.partition import Parts
from fedlora.data.tasks import deal, task_counts
from fedlora.engine import checkpoint, pipeline
from fedlora.engine.export import write_result
from fedlora.engine.federation import (
    Roster,
    client_ranks,
    load_pretrained,
    make_method,
    make_setup,
    make_trainer,
    read_roster,
    versions,
)
from fedlora.engine.inprocess import InProcess, Kept
from fedlora.engine.loop import Server, Tally, rounds, sampler
from fedlora.engine.pipeline import Pipeline
from fedlora.engine.record import Record, Row, summarise
from fedlora.errors import BadInput
from fedlora.training.encode import Encoded, encode
from fedlora.training.metrics import accuracy, macro_f1
from fedlora.training.trainer import Trainer
from fedlora.types import Client, Method, Setup


class Listener(Protocol):
    """Who follows a run: the command line's progress bars, or a test."""

    def note(self, text: str) -> None:
        """Something that a user should know."""

    def stage(self, text: str) -> None:
        """What is being prepared."""

    def begin(self, first: int, last: int, clients: int) -> None:
        """The rounds begin."""

    def examples(self, count: int) -> None:
        """So many examples were trained on."""

    def round(self, row: Row) -> None:
        """A round is complete and on disk."""


@dataclass(frozen=True)
class World:
    """Everything that a run works with."""

    config: Config
    method: Method
    transforms: Pipeline
    setup: Setup
    trainer: Trainer
    roster: Roster
    train: Mapping[int, Encoded]
    test: Encoded
    dataset: Dataset
    parts: Parts


def execute(config: Config, out: Path, resume: bool, listener: Listener) -> dict[str, Any]:
    """Run, or go on with, the run in `out`; returns its summary. Everything in `out` is whole at any moment.

    Raises:
        BadInput: the configuration asks for what cannot be, or `out` exists (without `resume`) or belongs to another
            configuration (with it).
    """
    summary = out / "summary.json"
    if out.exists():
        if not resume:
            raise BadInput(f"{out} exists already; give --resume to go on with it, or another --out")
        _same_run(config, out)
        if summary.exists():
            done: dict[str, Any] = json.loads(summary.read_text())
            if done["rounds"] >= config.train.rounds:
                listener.note(f"{out} is complete: {done['rounds']} rounds; nothing to do")
                return done
    world = prepare(config, listener)
    _check_roster(world.roster, out)
    _open(config, world, out)
    record = Record(out)
    saved = checkpoint.load(out / "checkpoint", world.method)
    if saved is None:
        saved = checkpoint.Saved(Server(0, world.method.init(world.setup), _head(world)), {}, {})
    for problem in saved.problems:
        listener.note(f"damaged checkpoint {problem}; going on from the one before, round {saved.server.round}")
    record.cut(saved.server.round)
    server = _play(world, saved, record, out, listener)
    listener.stage("writing the result")
    return _finish(world, server, record, out)


def prepare(config: Config, listener: Listener) -> World:
    """Load data and model, deal the data to the clients. Checks everything that can be wrong before training starts."""
    method = make_method(config)
    transforms = pipeline.make(config.transform, method, config.seed)
    listener.stage(f"reading {config.data.title}")
    dataset = load_data(config.data, config.seed)
    for note in dataset.notes:
        listener.note(note)
    parts = deal(dataset, config.data, config.clients, config.seed)
    ranks = client_ranks(config.clients, len(parts.train))
    dealt = zip(ranks, parts.train, strict=True)
    clients = tuple(Client(i, rank, len(where), task_counts(dataset, where)) for i, (rank, where) in enumerate(dealt))
    roster = Roster(dataset.label_names, clients, parts.names, tuple(len(where) for where in parts.test), dataset.tasks)
    listener.stage(f"loading {config.model.source}")
    pretrained = load_pretrained(config, roster)
    listener.stage("tokenising")
    limit = min(config.data.max_length, pretrained.tokenizer.model_max_length)
    if limit < config.data.max_length:
        listener.note(f"data.max_length = {config.data.max_length} is above the model's {limit} tokens; using {limit}")
    train, test = (
        replace(encode(pretrained.tokenizer, part.texts, part.labels, limit), tasks=part.tasks)
        for part in (dataset.train, dataset.test)
    )
    trainer = make_trainer(config, pretrained, dataset.tasks)
    setup = make_setup(config, trainer, clients)
    method.init(setup)  # refuses here, before anything is written, what it cannot do
    empty = [roster.names[c.id] for c in clients if c.num_examples == 0]
    if len(empty) == len(clients):
        raise BadInput("no client has any training example")
    if empty:
        listener.note(f"skipped, for they have no training example: {', '.join(empty)}")
    own = {c.id: train.take(parts.train[c.id]) for c in clients}
    return World(config, method, transforms, setup, trainer, roster, own, test, dataset, parts)


def _play(world: World, saved: checkpoint.Saved, record: Record, out: Path, listener: Listener) -> Server:
    setup, server, files = world.setup, saved.server, saved.files
    participants = sampler(setup, world.config.clients.sample)
    transport = InProcess(
        world.method,
        setup,
        world.trainer,
        world.train,
        world.config.model.head,
        saved.kept,
        listener.examples,
        world.transforms,
    )
    # Orders hold only the base updates that a client missed, so after a restart the base is brought to where clients had it.
    world.trainer.fold(world.method.deploy(server.state).base)
    listener.begin(server.round, setup.rounds, len(participants(1)))
    skipped = [c.id for c in setup.clients if c.num_examples == 0]
    start = time.perf_counter()
    played = rounds(world.method, setup, server, transport, participants, world.transforms)
    for server, tally, diagnostics in played:
        scored = time.perf_counter()
        row = _row(server.round, tally)
        if server.round % world.config.train.evaluate_every == 0 or server.round == setup.rounds:
            row |= evaluate(world, server, transport)
        row |= {"evaluate_s": time.perf_counter() - scored, "wall_s": time.perf_counter() - start}
        start = time.perf_counter()
        if skipped:
            row["skipped"] = skipped
        row = record.add(row, diagnostics)
        files = checkpoint.save(out / "checkpoint", server, transport.kept, tally.accepted, files)
        listener.round(row)
    return server


def _row(round: int, tally: Tally) -> Row:
    def traffic(name: str, t: Any) -> Row:
        parts = {f"{name}_params": t.params, f"{name}_bytes": t.size.total}
        return parts | {f"{name}_{part}_bytes": getattr(t.size, part) for part in ("values", "indices", "header")}

    row: Row = {
        "round": round,
        "train_s": tally.exchange_s,
        "aggregate_s": tally.aggregate_s,
        "loss": tally.loss / tally.examples if tally.examples else math.nan,
        "accuracy": math.nan,
        "macro_f1": math.nan,
        "clients": len(tally.accepted),
        "failed": len(tally.failed),
    }
    row |= traffic("upload", tally.up) | traffic("download", tally.down)
    if tally.failed:
        row["failures"] = {str(id): why for id, why in sorted(tally.failed.items())}
    return row


def evaluate(world: World, server: Server, transport: InProcess) -> Row:
    """Test metrics: of the one model on the whole test set, or, where clients end with different models, of each client's on
    its own part, weighted by its size."""
    personal_head = world.config.model.head is Head.PERSONAL
    predicted = np.zeros(len(world.test), dtype=np.int64)
    if not (world.method.FACTS.personal or personal_head):
        predicted = world.trainer.logits(world.method.deploy(server.state), server.head, world.test).argmax(axis=1)
        scores: Row = {"accuracy": accuracy(predicted, world.test.labels), "macro_f1": macro_f1(predicted, world.test.labels)}
        return scores | _by_task(world, predicted, np.arange(len(predicted)))
    by_client: dict[str, float] = {}
    for client in world.setup.clients:
        where = world.parts.test[client.id]
        if len(where):
            kept: Kept = transport.kept_by(client)
            model = world.method.deploy(server.state, client, kept.held)
            head = kept.head if personal_head else server.head
            predicted[where] = world.trainer.logits(model, head, world.test.take(where)).argmax(axis=1)
            by_client[str(client.id)] = accuracy(predicted[where], world.test.labels[where])
    everyone = np.concatenate(world.parts.test)
    own, labels = predicted[everyone], world.test.labels[everyone]
    scores = {"accuracy": accuracy(own, labels), "macro_f1": macro_f1(own, labels), "client_accuracy": by_client}
    return scores | _by_task(world, predicted, everyone)


def _by_task(world: World, predicted: np.ndarray, scored: np.ndarray) -> Row:
    """The accuracy of each task, in a run of several, over the test examples that were scored."""
    if not world.dataset.tasks:
        return {}
    task, right = world.test.tasks[scored], predicted[scored] == world.test.labels[scored]
    known = [(i, each.name) for i, each in enumerate(world.dataset.tasks) if (task == i).any()]
    return {"task_accuracy": {name: float(right[task == i].mean()) for i, name in known}}


def _finish(world: World, server: Server, record: Record, out: Path) -> dict[str, Any]:
    """Write the result and, last, the summary: its presence says that the run is complete."""
    from fedlora.report.curves import plot_run

    rows = record.rows()
    where = write_result(world.config, world.roster, world.method.deploy(server.state), server.head, out)
    plot_run(rows, f"{world.method.FACTS.title} on {world.config.data.title}", out)
    summary = summarise(rows) | {
        "result": where,
        "seed": world.config.seed,
        "device": str(world.trainer.device),
        "precision": str(world.trainer.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    spread = list(rows[-1].get("client_accuracy", {}).values())
    if spread:
        worst = sorted(spread)[: max(1, len(spread) // 10)]
        summary["clients"] = {"mean": float(np.mean(spread)), "worst_tenth": float(np.mean(worst))}
    checkpoint.write_whole(out / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _head(world: World) -> dict[str, Any]:
    return world.trainer.head if world.config.model.head is Head.SHARED else {}


def _open(config: Config, world: World, out: Path) -> None:
    """Make the run folder, whole: it is built beside its place and renamed. Also renews config.toml, for more rounds."""
    if not out.exists():
        from fedlora.report.split import plot_split

        fresh = out.with_name(f".{out.name}.part")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        (fresh / "federation.json").write_text(world.roster.to_json())
        (fresh / "config.toml").write_text(to_toml(config))
        plot_split(world.parts, world.dataset, fresh / "split.png")
        os.replace(fresh, out)
    checkpoint.write_whole(out / "config.toml", to_toml(config).encode())
    if not (out / "federation.json").exists():
        checkpoint.write_whole(out / "federation.json", world.roster.to_json().encode())


def _same_run(config: Config, out: Path) -> None:
    """BadInput when `out` holds a run of another configuration; a larger number of rounds is the one thing that may change."""
    import tomllib

    file = out / "config.toml"
    if not out.is_dir():
        raise BadInput(f"{out} is no folder")
    if not file.exists():
        if any(out.iterdir()):
            raise BadInput(f"{out} is no run folder: it has no config.toml")
        return
    try:
        before = resolve(tomllib.loads(file.read_text()))
    except ValueError as error:
        raise BadInput(f"{file}: {error}") from error
    if config.train.rounds < before.train.rounds:
        raise BadInput(
            f"{out} was started with train.rounds = {before.train.rounds}; it can be raised, not lowered to {config.train.rounds}"
        )
    same = before.model_copy(update={"train": before.train.model_copy(update={"rounds": config.train.rounds})})
    changed = _differences(as_tables(same), as_tables(config))
    if changed:
        raise BadInput(f"{out} was started with another configuration: {'; '.join(changed)}; use another --out")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    out: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} was {a!r}, now {b!r}")
    return out


def _check_roster(roster: Roster, out: Path) -> None:
    file = out / "federation.json"
    if file.exists() and read_roster(file) != roster:
        raise BadInput(
            f"{out} was started with other data: the clients of {file} are not those of data.source now; use another --out"
        )
