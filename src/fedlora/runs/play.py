"""A whole run: from a configuration to a run folder, resumable at any moment."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.clients.watch import similarity
from fedlora.collector import settled
from fedlora.config import Config, as_tables, to_toml
from fedlora.data.given import KEPT
from fedlora.disk import alone, founding, write_whole
from fedlora.errors import BadInput
from fedlora.gather.gather import RoundCounts
from fedlora.listener import Listener
from fedlora.models.load import Given
from fedlora.models.quantised import bits
from fedlora.names import counted
from fedlora.runs.connect import C, Connect, Connection, Kind, connected, initial_head, score_held_out
from fedlora.runs.context import Played, RunContext
from fedlora.runs.export import write_result
from fedlora.runs.folder import check_roster, finish, found, keep_again, require_same_run
from fedlora.runs.follow import tracked
from fedlora.runs.prepare import prepare, versions
from fedlora.runs.record import Record, Row
from fedlora.runs.saved import CHECKPOINT, adopt, load_saved
from fedlora.runs.trainers import TrainerClient, joined
from fedlora.runs.worker import reaching
from fedlora.server import checkpoint
from fedlora.server.checkpoint import Saved
from fedlora.server.energy import energy
from fedlora.server.evaluate import evaluate
from fedlora.server.loop import Server, play_round
from fedlora.summary import best_round, complete, exhausted
from fedlora.summary import read as read_summary
from fedlora.tasks.metrics import Metric
from fedlora.training.length import has_schedule, lr_factor
from fedlora.types import Diagnostics


def execute(
    config: Config,
    out: Path,
    resume: bool,
    listener: Listener,
    profile: bool = False,
    connect: Connect | None = None,
    keep: Callable[[Path], None] = lambda data: None,
    given: Given | None = None,
    clients: Sequence[TrainerClient] = (),
) -> dict[str, Any]:
    """Run, or go on with, the run in `out`; returns its summary. Everything in `out` is whole at any moment. With `profile`, the
    first round that is played leaves trace.json.gz, which chrome://tracing and ui.perfetto.dev open.

    Args:
        connect: says where clients are played; left out, the configuration does.
        keep: writes the run's data, where no file has it, into a folder of its name in the one that it is given; of a run that
            goes on, to be compared.
        given: the model, where it is at hand.
        clients: those with trainers of their own, where they are at hand.

    Raises:
        BadInput: the configuration asks for what cannot be, or `out` exists (without `resume`) or belongs to another
            configuration (with it).
    """
    if config.clients.names is not None:
        raise BadInput("clients.names: a federation between machines is played by fedlora federate; leave it out to play all here")
    with reaching(config) if connect is None else nullcontext(connect) as found:
        if config.train.trainer is None:
            return execute_kind(config, dealt(config, listener, given, found), out, resume, listener, profile, keep)
        config, kind = joined(config, listener, clients)
        return execute_kind(config, kind, out, resume, listener, profile, keep)


def execute_kind(
    config: Config,
    kind: Kind[C],
    out: Path,
    resume: bool,
    listener: Listener,
    profile: bool = False,
    keep: Callable[[Path], None] = lambda data: None,
) -> dict[str, Any]:
    """The same for any kind of run; see `execute`."""
    with ExitStack() as held:
        if os.path.lexists(out):
            if not resume:
                raise BadInput(f"{out} exists already; give --resume to go on with it, or another --out")
            require_same_run(config, out)
            keep_again(keep, out)
            done = read_summary(out)
            if done is not None and complete(done, config.train.rounds, config.train.patience):
                listener.note(f"{out} is complete: {counted(done['rounds'], 'round')}; nothing to do")
                return done
            held.enter_context(alone(out))
            place = None
        else:
            place = held.enter_context(founding(out))
            keep(place / KEPT)
        context = kind.prepare(place or out)
        if place is None:
            context.trainer.rows = check_roster(context.roster, out)
        else:
            found(context, place, out, partial(kind.picture, context))
        record = Record(out)
        saved = load_saved(out, config, context.setup.clients, context.method)
        if saved is None:
            saved = Saved(Server(0, context.method.init(context.setup), initial_head(context)))
        for problem in saved.problems:
            listener.note(f"damaged checkpoint {problem}; going on from the one before, round {saved.server.round}")
        record.cut(saved.server.round)
        write_whole(out / "config.toml", to_toml(config).encode())  # there may be more rounds now
        with (
            kind.connected(context, out, checkpoint.started(out / CHECKPOINT), listener) as connection,
            tracked(context, out, record.rows(), listener) as followed,
            settled(),
        ):
            last = play(context, connection, saved, record, out, followed, profile)
            listener.stage("writing the result")
            write = partial(kind.write, context)
            summary = finish(
                context,
                last,
                record,
                out,
                lambda server, rows: write(server, rows, out),
                lambda server: kind.held_out(context, connection, server),
            )
            followed.finish(summary)
        return summary


def dealt(config: Config, listener: Listener, given: Given | None, connect: Connect) -> Kind[RunContext]:
    """A run whose data are dealt here, with fedlora's own trainer."""
    from fedlora.report.split import plot_split

    def write(context: RunContext, server: Server, rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Any]:
        deployed = context.method.deploy(server.state)
        where = write_result(context.config, context.roster, deployed, server.head, rows, out, context.given)
        quantised = bits(context.trainer.base.model) is not None
        return {"result": where, "model": context.findings.summary(), "versions": versions(quantised)}

    return Kind(
        prepare=lambda place: prepare(config, listener, place, given),
        picture=lambda context, place: plot_split(context.parts, context.dataset, place / "split.png"),
        connected=lambda context, out, incarnation, followed: connected(context, out, incarnation, followed, connect),
        write=write,
        held_out=score_held_out,
    )


def play(
    context: Played, connection: Connection, saved: Saved, record: Record, out: Path, listener: Listener, profile: bool = False
) -> Server:
    """Play the rounds that are left, each recorded and kept when it is complete; returns the server after the last. They end early
    when the score on the validation part has not been better for `train.patience` scored rounds."""
    setup, server, train, federation = context.setup, saved.server, context.config.train, connection.federation
    rows, metric = record.rows(), connection.panel.scoring.metrics[0]
    best = _best(context, out, rows, metric)
    for worker in connection.workers[:1]:
        for written in (saved, *([best] if best else [])):
            adopt(out, written, context.method, worker.states)
    accepted = best.server.accepted if best else {}
    for worker in connection.workers:  # they start with the server, at its base; others are sent what they lack
        worker.catch_up(connection.incarnation, context.method.deploy(server.state).base)
    listener.begin(server.round, setup.rounds, len(federation.participants(1)), metric)
    skipped = [c.id for c in setup.clients if c.num_examples == 0]

    def keep() -> None:
        nonlocal accepted
        if best_round(rows, metric) == server.round:
            accepted = server.accepted
        checkpoint.save(out / CHECKPOINT, server, as_tables(context.config), best_round(rows, metric))

    start, stopped = time.perf_counter(), None
    with ExitStack() as trace:
        if profile:
            trace.enter_context(_trace(out / "trace.json.gz"))
        while server.round < setup.rounds and not stopped and not exhausted(rows, train.patience, metric):
            connection.watched.clear()
            server, counts, diagnostics = play_round(federation, server, accepted)
            row = _row(server.round, counts, connection.panel.scoring.metrics)
            due = server.round % train.evaluate_every == 0 or server.round == setup.rounds
            if due:
                scores, found, detail = _scored(context, connection, server)
                row, diagnostics = row | scores, {**found, **diagnostics}
                if server.round in (setup.rounds, best_round([*rows, row], metric)):
                    diagnostics = {**diagnostics, **detail}
            row |= connection.noticed()
            row["wall_s"] = time.perf_counter() - start
            start = time.perf_counter()  # what comes now counts as the next round's other time
            if has_schedule(train):
                row["lr"] = train.lr * lr_factor(train, server.round)
            if skipped:
                row["skipped"] = skipped
            rows.append(record.add(_with_other(row), diagnostics))
            keep()
            trace.close()  # one round: a longer trace is too large for its viewers
            stopped = listener.round(rows[-1])
            if stopped and not due:  # the last round is always scored
                scores, found, detail = _scored(context, connection, server)
                row |= {**scores, "wall_s": row["wall_s"] + scores["evaluate_s"]}
                rows[-1] = record.correct(_with_other(row), {**found, **diagnostics, **detail})
                keep()
            if server.round < setup.rounds and exhausted(rows, train.patience, metric):
                listener.note(
                    f"stopped after round {server.round}: no better on the validation part since round {best_round(rows, metric)}"
                )
    return server


def _scored(context: Played, connection: Connection, server: Server) -> tuple[Row, Diagnostics, Diagnostics]:
    """What a round's row says of its model, what is found out about its updates, and what the scores say in detail."""
    start = time.perf_counter()
    scores, detail = evaluate(connection.federation, server, connection.panel)
    seconds = time.perf_counter() - start
    found = {} if context.method.FACTS.personal else energy(context.method.deploy(server.state))
    return {**scores, "evaluate_s": seconds}, {**similarity(list(connection.watched.values())), **found}, detail


def _with_other(row: Row) -> Row:
    return row | {"other_s": row["wall_s"] - sum(row[f"{part}_s"] for part in ("train", "evaluate", "aggregate", "wire"))}


def _best(context: Played, out: Path, rows: Sequence[Row], metric: Metric) -> Saved | None:
    """The checkpoint of the best round by validation, where there is one."""
    best = best_round(rows, metric)
    return None if best is None else load_saved(out, context.config, context.setup.clients, context.method, best)


@contextmanager
def _trace(file: Path) -> Iterator[None]:
    from torch.profiler import profile

    with profile() as profiler:
        yield
    profiler.export_chrome_trace(str(file))


def _row(round: int, counts: RoundCounts, metrics: Sequence[Metric]) -> Row:
    def traffic(name: str, t: Any) -> Row:
        parts = {f"{name}_params": t.params, f"{name}_bytes": t.size.total}
        return parts | {f"{name}_{part}_bytes": getattr(t.size, part) for part in ("values", "indices", "header")}

    row: Row = {
        "round": round,
        "train_s": counts.exchange_s,
        "evaluate_s": 0.0,
        "aggregate_s": counts.aggregate_s,
        "wire_s": counts.wire_s,
        "loss": counts.loss / counts.examples if counts.examples else math.nan,
        **{metric.name: math.nan for metric in metrics},
        "metric": metrics[0].name,
        "score": math.nan,
        "clients": len(counts.accepted),
        "failed": len(counts.failed),
    }
    row |= traffic("upload", counts.up) | traffic("download", counts.down)
    if counts.forgotten:
        row["forgotten"] = sorted(counts.forgotten)
    if counts.failed:
        row["failures"] = {str(id): why for id, why in sorted(counts.failed.items())}
    return row
