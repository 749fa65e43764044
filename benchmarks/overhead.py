"""What everything costs beside training: 100 clients of one step each, and 10 sampled of a population of 10,000.

A whole round counts: orders, messages, aggregation, the row of metrics, the checkpoint on disk; not evaluation. Flower plays the
same rounds with a worker a core; its training is the sum over clients divided by the workers, as if they always shared it evenly.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import harness, ours
from benchmarks.harness import Row
from benchmarks.peers import flower_sim
from fedlora.data.encoded import Encoded
from fedlora.listener import Quiet
from fedlora.runs import play
from fedlora.runs.connect import connected
from fedlora.runs.context import RunContext
from fedlora.runs.record import Record
from fedlora.server.checkpoint import Saved
from fedlora.server.loop import Server
from fedlora.types import Client

SHARE, EACH_MS = 0.03, 1.0  # the targets: of the round, and of a client
POOL = 100  # distinct clients' data; a larger population shares it


@dataclass(frozen=True)
class Population:
    clients: int
    sample: int
    rounds: int  # that count

    def __str__(self) -> str:
        return f"{self.clients:,} clients, {self.sample} a round"


FULL = (Population(100, 100, 4), Population(10_000, 10, 20))
SMALL = (Population(10, 10, 2), Population(1_000, 4, 3))


class Stamps(Quiet):
    """When each round was over, and how long its training had taken by then."""

    def __init__(self, trainer: ours.Clocked) -> None:
        self.trainer, self.rows = trainer, list[tuple[float, float, Mapping[str, Any]]]()

    def round(self, row: Mapping[str, Any]) -> None:
        self.rows.append((time.perf_counter(), self.trainer.seconds, row))


def populated(context: RunContext, population: Population, each: int) -> RunContext:
    """The context with so many clients of `each` examples, which are of the pool's."""
    rank = context.config.clients.rank
    assert isinstance(rank, int)
    whole = list(context.train.values())
    ids = tuple(x for data in whole for x in data.inputs)
    labels, sizes = (np.concatenate([getattr(data, name) for data in whole]) for name in ("targets", "sizes"))
    whole_pool = Encoded(ids, labels, sizes)
    pool = [whole_pool.take(np.arange(k * each, (k + 1) * each)) for k in range(POOL)]
    clients = tuple(Client(k, rank, each) for k in range(population.clients))
    config = ours.configured(
        ours.configured_tables(context.config),
        {"clients": {"sample": population.sample}, "train": {"rounds": population.rounds + 2, "evaluate_every": 1_000_000}},
    )
    setup = replace(context.setup, clients=clients, rounds=config.train.rounds)
    data = {client.id: pool[client.id % POOL] for client in clients}
    return replace(context, config=config, setup=setup, train=data)


def fedlora(context: RunContext, population: Population) -> Row:
    """Our rounds, as `fedlora run` plays them. The first one warms up, and the last one ends in an evaluation: neither counts."""
    clock = ours.Clocked(context.trainer)
    stamps = Stamps(clock)
    with tempfile.TemporaryDirectory(prefix="bench-") as temp:
        timed: Any = replace(context, trainer=clock)  # type: ignore[arg-type]
        saved = Saved(Server(0, context.method.init(context.setup)))
        with connected(timed, Path(temp), 1, stamps) as connection:
            play.play(timed, connection, saved, Record(Path(temp)), Path(temp), stamps)
    pairs = list(zip(stamps.rows, stamps.rows[1:-1], strict=False))
    whole = [after[0] - before[0] for before, after in pairs]
    training = [after[1] - before[1] for before, after in pairs]
    parts = {
        name: median(after[2][name] for _, after in pairs)
        for name in ("train_s", "aggregate_s", "wire_s", "other_s")
        if name in stamps.rows[0][2]
    }
    return _row("fedlora", population, whole, training) | {"parts": parts}


def flower(context: RunContext, population: Population, keep_model: bool, rounds: int) -> Row:
    """The same rounds in Flower's simulation, with a client that keeps its model between messages or builds it for each."""
    pool = [context.train[k] for k in range(min(POOL, population.clients))]
    with tempfile.TemporaryDirectory(prefix="bench-") as temp:
        job = flower_sim.describe(
            context, pool, Path(temp), clients=population.clients, sample=population.sample,
            rounds=rounds, keep_model=keep_model,
        )  # fmt: skip
        played = flower_sim.play(job)
    name = "Flower, model kept" if keep_model else "Flower, as FlowerTune"
    return _row(name, population, [r.whole_s for r in played], [r.train_s / job.cpus for r in played])


def _row(side: str, population: Population, whole: list[float], training: list[float]) -> Row:
    outside = [a - b for a, b in zip(whole, training, strict=True)]
    return {
        "clients": str(population),
        "side": side,
        "round, s": median(whole),
        "training, s": median(training),
        "share outside training": median(o / w for o, w in zip(outside, whole, strict=True)),
        "ms a client": 1000 * median(outside) / population.sample,
        "seconds": whole,
    }


def main(quick: bool = False) -> None:
    """Engine time outside training, ours against Flower's simulation."""
    each = 4 if quick else 32
    populations = SMALL if quick else FULL
    context = ours.context({"data": {"limit": POOL * each, "partition": "iid"}, "clients": {"count": POOL}})
    rows: list[Row] = []
    parts: dict[str, Row] = {}
    for population in populations:
        own = populated(context, population, each)
        with harness.console.status(str(population)):
            row = fedlora(own, population)
            parts[str(population)] = row.pop("parts")
            rows.append(row | {"target": f"{SHARE:.0%}, {EACH_MS:g} ms"})
            if flower_sim.installed() and not (quick and population is populations[0]):
                rows.append(flower(own, population, True, 1 if population.sample > 10 else 3))
                if population.sample <= 10 and not quick:
                    rows.append(flower(own, population, False, 1))
    if not flower_sim.installed():
        harness.console.print("Flower is not installed here, so it is not measured: pip install -e '.[bench]'")
    facts = {
        "examples a client, all in one step": each,
        "model": context.config.model.source,
        "method": context.config.method.name,
        "rank": context.config.clients.rank,
        "distinct clients' data": POOL,
        "our parts of a round, s": parts,
    }
    harness.finish("overhead", "overhead: what a round costs beside training (MiniLM, one step a client)", rows, facts, quick)


if __name__ == "__main__":
    harness.command(main)
