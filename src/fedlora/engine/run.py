"""A whole run in one process: from a configuration to a run folder, resumable at any moment."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedlora.config import Config, Head, as_tables, read_recipe, resolve, to_toml
from fedlora.data.dataset import Split
from fedlora.data.load import load as load_data
from fedlora.data.tasks import deal
from fedlora.engine import checkpoint, pipeline, wire
from fedlora.engine.evaluate import evaluate
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
    require_validation,
    try_pretrained,
    versions,
)
from fedlora.engine.inprocess import InProcess
from fedlora.engine.kept import Shelf
from fedlora.engine.lock import alone, founding
from fedlora.engine.loop import Server, Tally, rounds, sampler
from fedlora.engine.packages import require
from fedlora.engine.record import Record, Row
from fedlora.engine.study import energy, study
from fedlora.engine.world import World
from fedlora.errors import BadInput, RunFailed
from fedlora.models.quiet import uncollected
from fedlora.summary import best_round, complete, exhausted, summarise
from fedlora.summary import read as read_summary
from fedlora.training.encode import Encoded, encode


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


def execute(config: Config, out: Path, resume: bool, listener: Listener, profile: bool = False) -> dict[str, Any]:
    """Run, or go on with, the run in `out`; returns its summary. Everything in `out` is whole at any moment. With `profile`, the
    first round that is played leaves trace.json.gz, which chrome://tracing and ui.perfetto.dev open.

    Raises:
        BadInput: the configuration asks for what cannot be, or `out` exists (without `resume`) or belongs to another
            configuration (with it).
    """
    with ExitStack() as held:
        if os.path.lexists(out):
            if not resume:
                raise BadInput(f"{out} exists already; give --resume to go on with it, or another --out")
            _same_run(config, out)
            done = read_summary(out)
            if done is not None and complete(done, config.train.rounds):
                listener.note(f"{out} is complete: {done['rounds']} rounds; nothing to do")
                return done
            held.enter_context(alone(out))
            place = None
        else:
            place = held.enter_context(founding(out))
        world = prepare(config, listener)
        if place is None:
            world.trainer.rows = _check_roster(world.roster, out)
        else:
            _found(world, place, out)
        record = Record(out)
        saved = checkpoint.load(out / "checkpoint", world.method)
        if saved is None:
            saved = checkpoint.Saved(Server(0, world.method.init(world.setup), _head(world)), {})
        for problem in saved.problems:
            listener.note(f"damaged checkpoint {problem}; going on from the one before, round {saved.server.round}")
        record.cut(saved.server.round)
        checkpoint.write_whole(out / "config.toml", to_toml(config).encode())  # there may be more rounds now
        last = play(world, saved, record, out, listener, profile)
        listener.stage("writing the result")
        return _finish(world, last, record, out)


@uncollected()
def prepare(config: Config, listener: Listener) -> World:
    """Load data and model, deal the data to the clients. Checks everything that can be wrong before training starts."""
    require(config)
    method = make_method(config)
    transforms = pipeline.make(config.transform, method, config.seed, config.model.head)
    listener.stage(f"reading {config.data.title}")
    dataset = load_data(config.data, config.seed)
    for note in dataset.notes:
        listener.note(note)
    require_validation(config, dataset)
    parts = deal(dataset, config.data, config.clients, config.seed)
    clients = make_clients(config.clients, dataset, parts)
    num_test = tuple(len(where) for where in parts.test)
    roster = Roster(dataset.label_names, clients, parts.names, num_test, dataset.tasks, data=dataset.digest)
    listener.stage(f"loading {config.model.source}")
    pretrained = load_pretrained(config, roster)
    listener.stage("trying the model")
    findings = rehearsed(config, pretrained, try_pretrained(config, pretrained))
    for note in findings.notes:
        listener.note(note)
    listener.stage("tokenising")

    def encoded(part: Split) -> Encoded:
        return replace(encode(pretrained.tokenizer, part.texts, part.labels, findings.limit), tasks=part.tasks)

    train, test = encoded(dataset.train), encoded(dataset.test)
    validation = None if dataset.validation is None else encoded(dataset.validation)
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
    return World(config, method, transforms, setup, trainer, findings, roster, own, test, validation, dataset, parts)


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
    """Play the rounds that are left, each recorded and kept when it is complete; returns the server after the last. They end early
    when the score on the validation part has not been better for `train.patience` scored rounds."""
    setup, server, train = world.setup, saved.server, world.config.train
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
    rows = record.rows()
    left = [] if exhausted(rows, train.patience) else rounds(world.method, setup, server, transport, participants, world.transforms)
    with ExitStack() as trace:
        if profile:
            trace.enter_context(_trace(out / "trace.json.gz"))
        for server, tally, diagnostics in left:
            row = _row(server.round, tally)
            if server.round % train.evaluate_every == 0 or server.round == setup.rounds:
                scored = time.perf_counter()
                scores, confused = evaluate(world, server, transport)
                row |= scores
                row["evaluate_s"] = time.perf_counter() - scored
                found = {} if world.method.FACTS.personal else energy(world.method.deploy(server.state))
                diagnostics = {**study(transport.learned), **found, **diagnostics}
                if server.round in (setup.rounds, best_round([*rows, row])):
                    diagnostics["confusion"] = confused
            row["wall_s"] = time.perf_counter() - start
            row["other_s"] = row["wall_s"] - sum(row[f"{part}_s"] for part in ("train", "evaluate", "aggregate", "wire"))
            start = time.perf_counter()  # what comes now counts as the next round's other time
            if skipped:
                row["skipped"] = skipped
            rows.append(record.add(row, diagnostics))
            checkpoint.save(out / "checkpoint", server, transport.shelf.places, as_tables(world.config), best_round(rows))
            trace.close()  # one round: a longer trace is too large for its viewers
            listener.round(rows[-1])
            if server.round < setup.rounds and exhausted(rows, train.patience):
                listener.note(
                    f"stopped after round {server.round}: no better on the validation part since round {best_round(rows)}"
                )
                break
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


def _finish(world: World, last: Server, record: Record, out: Path) -> dict[str, Any]:
    """Write the result and, last, the summary: its presence says that the run is complete."""
    rows = record.rows()
    summary = summarise(rows)
    written = summary["written"]["round"]
    if rows[written - 1].get("undecided") and not rows[written - 1]["accuracy"]:
        raise RunFailed(f"round {written}: the model gives no finite numbers, so its training diverged; a lower train.lr may help")
    server = last
    if written != last.round:
        saved = checkpoint.load(out / "checkpoint", world.method, written)
        assert saved is not None
        server = saved.server
    where = write_result(world.config, world.roster, world.method.deploy(server.state), server.head, rows[:written], out)
    summary |= {
        "result": where,
        "stopped_early": last.round < world.setup.rounds,
        "seed": world.config.seed,
        "device": str(world.trainer.device),
        "precision": str(world.trainer.dtype).removeprefix("torch."),
        "model": world.findings.summary(),
        "versions": versions(),
    }
    spread = list(rows[written - 1].get("client_accuracy", {}).values())
    if spread:
        worst = sorted(spread)[: max(1, len(spread) // 10)]
        summary["clients"] = {"mean": float(np.mean(spread)), "worst_tenth": float(np.mean(worst))}
    checkpoint.write_whole(out / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _head(world: World) -> dict[str, Any]:
    return world.trainer.head if world.config.model.head is Head.SHARED else {}


def _found(world: World, place: Path, out: Path) -> None:
    """Make the run folder, whole: it is built in `place` and renamed."""
    from fedlora.report.split import plot_split

    (place / "federation.json").write_text(world.roster.to_json())
    (place / "config.toml").write_text(to_toml(world.config))
    plot_split(world.parts, world.dataset, place / "split.png")
    os.rename(place, out)


def _same_run(config: Config, out: Path) -> None:
    """BadInput when `out` holds a run of another configuration; a larger number of rounds is the one thing that may change."""
    file = out / "config.toml"
    if not out.is_dir():
        raise BadInput(f"{out} is no folder")
    if not file.exists():
        raise BadInput(f"{out} is no run folder: it has no config.toml")
    written = read_recipe(str(file))
    before = resolve(checkpoint.configured(out / "checkpoint") or written)
    if config.train.rounds < before.train.rounds:
        raise BadInput(
            f"{out} was started with train.rounds = {before.train.rounds}; it can be raised, not lowered to {config.train.rounds}"
        )
    same = before.model_copy(update={"train": before.train.model_copy(update={"rounds": config.train.rounds})})
    changed = _differences(as_tables(same), as_tables(config))
    if changed:
        where = f"; {file} was changed" if _differences(as_tables(before), as_tables(resolve(written))) else "; use another --out"
        raise BadInput(f"{out} was started with another configuration: {'; '.join(changed)}{where}")


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
    before = read_roster(file)
    if before != roster:
        raise BadInput(
            f"{out} was started with other data: the clients of {file} are not those of data.source now; use another --out"
        )
    if before.data is not None and before.data != roster.data:
        raise BadInput(f"{out} was started with other data: the texts or labels of data.source have changed; use another --out")
    assert roster.rows is not None
    return before.rows or roster.rows
