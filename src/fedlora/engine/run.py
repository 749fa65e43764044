"""A whole run in one process: from a configuration to a run folder, resumable at any moment."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.profiler import record_function

from fedlora.config import Config, Head, as_tables, resolve, to_toml
from fedlora.data.dataset import Dataset
from fedlora.data.load import load as load_data
from fedlora.data.partition import Parts
from fedlora.data.tasks import deal
from fedlora.engine import checkpoint, pipeline, wire
from fedlora.engine.export import write_result
from fedlora.engine.federation import (
    Roster,
    load_pretrained,
    make_clients,
    make_method,
    make_setup,
    make_trainer,
    read_roster,
    rehearsed,
    try_pretrained,
    versions,
)
from fedlora.engine.inprocess import InProcess
from fedlora.engine.kept import Kept, Shelf
from fedlora.engine.lock import alone
from fedlora.engine.loop import Server, Tally, rounds, sampler
from fedlora.engine.pipeline import Pipeline
from fedlora.engine.record import Record, Row, summarise
from fedlora.engine.study import energy, study
from fedlora.errors import BadInput
from fedlora.models.quiet import uncollected
from fedlora.models.trial import Findings
from fedlora.training.encode import Encoded, encode
from fedlora.training.metrics import accuracy, macro_f1
from fedlora.training.trainer import Question, Trainer
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
    findings: Findings
    roster: Roster
    train: Mapping[int, Encoded]
    test: Encoded
    dataset: Dataset
    parts: Parts


def execute(config: Config, out: Path, resume: bool, listener: Listener, profile: bool = False) -> dict[str, Any]:
    """Run, or go on with, the run in `out`; returns its summary. Everything in `out` is whole at any moment. With `profile`, the
    first round that is played leaves trace.json.gz, which chrome://tracing and ui.perfetto.dev open.

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
    world.trainer.rows = _check_roster(world.roster, out)
    _open(config, world, out)
    with alone(out):
        record = Record(out)
        saved = checkpoint.load(out / "checkpoint", world.method)
        if saved is None:
            saved = checkpoint.Saved(Server(0, world.method.init(world.setup), _head(world)), {})
        for problem in saved.problems:
            listener.note(f"damaged checkpoint {problem}; going on from the one before, round {saved.server.round}")
        record.cut(saved.server.round)
        server = play(world, saved, record, out, listener, profile)
        listener.stage("writing the result")
        return _finish(world, server, record, out)


@uncollected()
def prepare(config: Config, listener: Listener) -> World:
    """Load data and model, deal the data to the clients. Checks everything that can be wrong before training starts."""
    method = make_method(config)
    transforms = pipeline.make(config.transform, method, config.seed, config.model.head)
    listener.stage(f"reading {config.data.title}")
    dataset = load_data(config.data, config.seed)
    for note in dataset.notes:
        listener.note(note)
    parts = deal(dataset, config.data, config.clients, config.seed)
    clients = make_clients(config.clients, dataset, parts)
    roster = Roster(dataset.label_names, clients, parts.names, tuple(len(where) for where in parts.test), dataset.tasks)
    listener.stage(f"loading {config.model.source}")
    pretrained = load_pretrained(config, roster)
    listener.stage("trying the model")
    findings = rehearsed(config, pretrained, try_pretrained(config, pretrained))
    for note in findings.notes:
        listener.note(note)
    listener.stage("tokenising")
    train, test = (
        replace(encode(pretrained.tokenizer, part.texts, part.labels, findings.limit), tasks=part.tasks)
        for part in (dataset.train, dataset.test)
    )
    for note in _about_tokens(train, test, findings.limit):
        listener.note(note)
    trainer = make_trainer(config, pretrained, findings, dataset.tasks)
    form, modules = findings.form, tuple(trainer.shapes)
    roster = replace(roster, modules=modules, rows=trainer.rows, max_length=findings.limit, padding=form.padding)
    setup = make_setup(config, trainer, clients)
    method.init(setup)  # refuses here, before anything is written, what it cannot do
    empty = [roster.names[c.id] for c in clients if c.num_examples == 0]
    if len(empty) == len(clients):
        raise BadInput("no client has any training example")
    if empty:
        listener.note(f"skipped, for they have no training example: {', '.join(empty)}")
    own = {c.id: train.take(parts.train[c.id]) for c in clients}
    return World(config, method, transforms, setup, trainer, findings, roster, own, test, dataset, parts)


def _about_tokens(train: Encoded, test: Encoded, limit: int) -> Iterator[str]:
    """What a user should know of the texts as tokens. BadInput where the tokenizer knows no word of them."""
    unknown = f"{100 * train.unknown:.0f} % of the training texts' tokens are unknown to the tokenizer, or it finds none in a text"
    if train.unknown > 0.99:
        raise BadInput(f"{unknown}: it is not this model's, or not for texts like these, and nothing can be learned")
    if train.unknown > 0.25:
        yield unknown
    for name, part in (("training", train), ("test", test)):
        if part.cut:
            yield f"{part.cut:,} of {len(part):,} {name} texts are longer than {limit} tokens, and cut"


def play(world: World, saved: checkpoint.Saved, record: Record, out: Path, listener: Listener, profile: bool = False) -> Server:
    """Play the rounds that are left, each recorded and kept when it is complete; returns the server after the last."""
    setup, server = world.setup, saved.server
    participants = sampler(setup, world.config.clients.sample)
    transport = InProcess(
        world.method,
        setup,
        world.trainer,
        world.train,
        world.config.model.head,
        Shelf(out / "checkpoint", wire.message_classes(world.method), saved.places),
        listener.examples,
        world.transforms,
    )
    # Orders hold only the base updates that a client missed, so after a restart the base is brought to where clients had it.
    world.trainer.fold(world.method.deploy(server.state).base)
    listener.begin(server.round, setup.rounds, len(participants(1)))
    skipped = [c.id for c in setup.clients if c.num_examples == 0]
    start = time.perf_counter()
    played = rounds(world.method, setup, server, transport, participants, world.transforms)
    with ExitStack() as trace:
        if profile:
            trace.enter_context(_trace(out / "trace.json.gz"))
        for server, tally, diagnostics in played:
            row = _row(server.round, tally)
            if server.round % world.config.train.evaluate_every == 0 or server.round == setup.rounds:
                scored = time.perf_counter()
                row |= evaluate(world, server, transport)
                row["evaluate_s"] = time.perf_counter() - scored
                found = {} if world.method.FACTS.personal else energy(world.method.deploy(server.state))
                diagnostics = {**study(transport.learned), **found, **diagnostics}
            row["wall_s"] = time.perf_counter() - start
            row["other_s"] = row["wall_s"] - sum(row[f"{part}_s"] for part in ("train", "evaluate", "aggregate", "wire"))
            start = time.perf_counter()  # what comes now counts as the next round's other time
            if skipped:
                row["skipped"] = skipped
            row = record.add(row, diagnostics)
            checkpoint.save(out / "checkpoint", server, transport.shelf.places)
            trace.close()  # one round: a longer trace is too large for its viewers
            listener.round(row)
    return server


@contextmanager
def _trace(file: Path) -> Iterator[None]:
    from torch.profiler import profile

    with profile() as profiler:
        yield
    profiler.export_chrome_trace(str(file))


def _row(round: int, tally: Tally) -> Row:
    def traffic(name: str, t: Any) -> Row:
        parts = {f"{name}_params": t.params, f"{name}_bytes": t.size.total}
        return parts | {f"{name}_{part}_bytes": getattr(t.size, part) for part in ("values", "indices", "header")}

    row: Row = {
        "round": round,
        "train_s": tally.exchange_s,
        "evaluate_s": 0.0,
        "aggregate_s": tally.aggregate_s,
        "wire_s": tally.wire_s,
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


@record_function("evaluate")
def evaluate(world: World, server: Server, transport: InProcess) -> Row:
    """Test metrics: of the one model on the whole test set, or, where clients end with different models, of each client's on
    its own part, weighted by its size."""
    personal_head = world.config.model.head is Head.PERSONAL
    predicted = np.zeros(len(world.test), dtype=np.int64)
    if not (world.method.FACTS.personal or personal_head):
        (logits,) = world.trainer.logits([Question(world.method.deploy(server.state), server.head, world.test)])
        predicted = logits.argmax(axis=1)
        scores: Row = {"accuracy": accuracy(predicted, world.test.labels), "macro_f1": macro_f1(predicted, world.test.labels)}
        return scores | _by_task(world, predicted, np.arange(len(predicted)))
    by_client: dict[str, float] = {}
    scored = [client for client in world.setup.clients if len(world.parts.test[client.id])]

    def ask(client: Client) -> Question:
        kept: Kept = transport.kept_by(client)
        model = world.method.deploy(server.state, client, kept.held)
        return Question(model, kept.head if personal_head else server.head, world.test.take(world.parts.test[client.id]))

    for client, logits in zip(scored, world.trainer.logits(map(ask, scored)), strict=True):
        where = world.parts.test[client.id]
        predicted[where] = logits.argmax(axis=1)
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
    rows = record.rows()
    where = write_result(world.config, world.roster, world.method.deploy(server.state), server.head, rows, out)
    summary = summarise(rows) | {
        "result": where,
        "seed": world.config.seed,
        "device": str(world.trainer.device),
        "precision": str(world.trainer.dtype).removeprefix("torch."),
        "model": world.findings.summary(),
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


def _check_roster(roster: Roster, out: Path) -> int:
    """BadInput when the run in `out` was started with other data; returns the tokens that fill a step of it."""
    file = out / "federation.json"
    before = read_roster(file) if file.exists() else roster
    if before != roster:
        raise BadInput(
            f"{out} was started with other data: the clients of {file} are not those of data.source now; use another --out"
        )
    assert roster.rows is not None
    return before.rows or roster.rows
