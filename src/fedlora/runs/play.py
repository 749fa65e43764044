"""A whole run in one process: from a configuration to a run folder, resumable at any moment."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora import wire
from fedlora.clients.state import StateStore
from fedlora.clients.watch import similarity
from fedlora.config import Config, HeadMode, as_tables, to_toml
from fedlora.disk import alone, founding, write_whole
from fedlora.errors import BadInput
from fedlora.listener import Listener
from fedlora.runs.context import RunContext
from fedlora.runs.evaluate import evaluate
from fedlora.runs.folder import check_roster, finish, found, require_same_run
from fedlora.runs.prepare import prepare
from fedlora.runs.record import Record, Row
from fedlora.server import checkpoint
from fedlora.server.energy import energy
from fedlora.server.loop import RoundCounts, Server, rounds
from fedlora.server.sampling import accepted_by, sampler
from fedlora.summary import best_round, complete, exhausted
from fedlora.summary import read as read_summary
from fedlora.transports.inprocess import InProcess


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
            require_same_run(config, out)
            done = read_summary(out)
            if done is not None and complete(done, config.train.rounds):
                listener.note(f"{out} is complete: {done['rounds']} rounds; nothing to do")
                return done
            held.enter_context(alone(out))
            place = None
        else:
            place = held.enter_context(founding(out))
        context = prepare(config, listener)
        if place is None:
            context.trainer.rows = check_roster(context.roster, out)
        else:
            found(context, place, out)
        record = Record(out)
        saved = checkpoint.load(out / "checkpoint", context.method)
        if saved is None:
            saved = checkpoint.Saved(Server(0, context.method.init(context.setup), _head(context)), {})
        for problem in saved.problems:
            listener.note(f"damaged checkpoint {problem}; going on from the one before, round {saved.server.round}")
        record.cut(saved.server.round)
        write_whole(out / "config.toml", to_toml(config).encode())  # there may be more rounds now
        last = play(context, saved, record, out, listener, profile)
        listener.stage("writing the result")
        return finish(context, last, record, out)


def play(
    context: RunContext, saved: checkpoint.Saved, record: Record, out: Path, listener: Listener, profile: bool = False
) -> Server:
    """Play the rounds that are left, each recorded and kept when it is complete; returns the server after the last. They end early
    when the score on the validation part has not been better for `train.patience` scored rounds."""
    setup, server, train = context.setup, saved.server, context.config.train
    participants = sampler(setup.clients, setup.seed, context.config.clients.sample)
    transport = InProcess(
        context.method,
        setup,
        context.trainer,
        context.train,
        context.config.model.head,
        StateStore(out / "checkpoint", wire.message_classes(context.method), saved.places),
        listener.examples,
        context.transforms,
    )
    # Orders hold only the base updates that a client missed, so after a restart the base is brought to where clients had it.
    context.trainer.fold(context.method.deploy(server.state).base)
    listener.begin(server.round, setup.rounds, len(participants(1)))
    skipped = [c.id for c in setup.clients if c.num_examples == 0]
    start = time.perf_counter()
    rows = record.rows()
    if server.round and not server.accepted:
        server = replace(server, accepted=accepted_by(rows, participants))
    left = (
        []
        if exhausted(rows, train.patience)
        else rounds(context.method, setup, server, transport, participants, context.transforms)
    )
    with ExitStack() as trace:
        if profile:
            trace.enter_context(_trace(out / "trace.json.gz"))
        for server, tally, diagnostics in left:
            row = _row(server.round, tally)
            if server.round % train.evaluate_every == 0 or server.round == setup.rounds:
                scored = time.perf_counter()
                scores, confused = evaluate(context, server, transport)
                row |= scores
                row["evaluate_s"] = time.perf_counter() - scored
                found = {} if context.method.FACTS.personal else energy(context.method.deploy(server.state))
                diagnostics = {**similarity(transport.learned), **found, **diagnostics}
                if server.round in (setup.rounds, best_round([*rows, row])):
                    diagnostics["confusion"] = confused
            row["wall_s"] = time.perf_counter() - start
            row["other_s"] = row["wall_s"] - sum(row[f"{part}_s"] for part in ("train", "evaluate", "aggregate", "wire"))
            start = time.perf_counter()  # what comes now counts as the next round's other time
            if skipped:
                row["skipped"] = skipped
            rows.append(record.add(row, diagnostics))
            checkpoint.save(out / "checkpoint", server, transport.shelf.places, as_tables(context.config), best_round(rows))
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


def _row(round: int, tally: RoundCounts) -> Row:
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


def _head(context: RunContext) -> dict[str, Any]:
    return context.trainer.head if context.config.model.head is HeadMode.SHARED else {}
