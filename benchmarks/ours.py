"""Our side: the engine's own round loop over one process, with a clock."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness import Sample, Side
from fedlora.config import Config, as_tables, resolve
from fedlora.engine.evaluate import evaluate
from fedlora.engine.inprocess import InProcess
from fedlora.engine.loop import Server, Tally, rounds, sampler
from fedlora.engine.run import prepare
from fedlora.engine.world import World
from fedlora.training.encode import Encoded
from fedlora.training.trainer import Trainer

# The published setting: thirty clients of a strongly heterogeneous split, rank 8 on every linear layer of the blocks. The head is
# frozen and dropout is off, here and for every peer.
SETTING: Mapping[str, Any] = {
    "method": {"name": "fedit"},
    "model": {"source": "minilm", "head": "frozen"},
    "data": {"source": "banking77", "alpha": 0.1},
    "clients": {"count": 30, "rank": 8},
    "train": {"epochs": 1, "batch_size": 32, "lr": 5e-4, "weight_decay": 0.01},
}


class Quiet:
    """Follows a run without a word (`fedlora.engine.run.Listener`)."""

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def begin(self, first: int, last: int, clients: int) -> None: ...

    def examples(self, count: int) -> None: ...

    def round(self, row: dict[str, Any]) -> None: ...


def world(*tables: Mapping[str, Any]) -> World:
    """Everything that a run of the published setting works with, the tables laid over it."""
    return prepare(configured(*tables), Quiet())


def configured(*tables: Mapping[str, Any]) -> Config:
    return resolve(SETTING, *tables)


def configured_tables(config: Config) -> dict[str, Any]:
    """The keys of a configuration that make the work what it is."""
    tables = as_tables(config)
    return {name: tables[name] for name in ("seed", "method", "model", "data", "clients", "train")}


def play(world: World) -> tuple[InProcess, Iterator[tuple[Server, Tally]]]:
    """The transport, and the rounds from the method's first state, one at a `next`."""
    participants = sampler(world.setup, world.config.clients.sample)
    transport = InProcess(
        world.method, world.setup, world.trainer, world.train, world.config.model.head, transforms=world.transforms
    )
    start = Server(0, world.method.init(world.setup))
    played = rounds(world.method, world.setup, start, transport, participants, world.transforms)
    return transport, (_whole(server, tally) for server, tally, _ in played)


def _whole(server: Server, tally: Tally) -> tuple[Server, Tally]:
    if tally.failed:
        raise RuntimeError(f"clients failed: {tally.failed}")
    return server, tally


def accuracy(world: World) -> float:
    """Test accuracy after the last round."""
    transport, played = play(world)
    *_, (server, _) = played
    scores, _ = evaluate(world, server, transport)
    return float(scores["accuracy"])


def side(world: World, rounds: int = 1, passes: int = 1) -> Side:
    """So many rounds a repetition, going on where the last one stopped; an example is trained on `passes` times a round. What
    counts is the time in the transport: training and all that a client does around it, without aggregation and evaluation."""
    _, played = play(world)
    clients = [world.train[c.id] for c in world.setup.clients]

    def run() -> Sample:
        seconds = sum(next(played)[1].exchange_s for _ in range(rounds))
        return work(seconds, clients, rounds * passes)

    return run


def work(seconds: float, clients: Sequence[Encoded], times: int) -> Sample:
    """A sample of so many passes over the clients' examples."""
    tokens = sum(len(ids) for data in clients for ids in data.ids)
    return Sample(seconds, times * sum(map(len, clients)), times * tokens)


def weights(world: World) -> int:
    """Frozen weights in the adapted layers."""
    return sum(d_out * d_in for d_out, d_in in world.setup.shapes.values())


class Clocked:
    """A trainer, and the seconds that its training took."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.seconds = trainer, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trainer, name)

    def train(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        outcomes = self.trainer.train(*args, **kwargs)
        while True:
            start = time.perf_counter()
            outcome = next(outcomes, None)
            self.seconds += time.perf_counter() - start
            if outcome is None:
                return
            yield outcome
