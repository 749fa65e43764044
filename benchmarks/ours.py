"""Our side: our own round loop over one process, with a clock."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness import Sample, Side
from fedlora.config import Config, as_tables, resolve
from fedlora.data.encoded import Encoded
from fedlora.gather.gather import RoundCounts
from fedlora.listener import Quiet
from fedlora.runs.connect import Connection, connected
from fedlora.runs.context import RunContext
from fedlora.runs.prepare import prepare
from fedlora.server.evaluate import evaluate
from fedlora.server.loop import Server, play_round
from fedlora.training.batched import Trainer

# The published setting: thirty clients of a strongly heterogeneous split, rank 8 on every linear layer of the blocks. The head is
# frozen and dropout is off, here and for every peer.
SETTING: Mapping[str, Any] = {
    "method": {"name": "fedit"},
    "model": {"source": "minilm", "head": "frozen"},
    "data": {"source": "banking77", "alpha": 0.1},
    "clients": {"count": 30, "rank": 8},
    "train": {"epochs": 1, "batch_size": 32, "lr": 5e-4, "weight_decay": 0.01},
}


def context(*tables: Mapping[str, Any]) -> RunContext:
    """Everything that a run of the published setting works with, the tables laid over it."""
    return prepare(configured(*tables), Quiet())


def configured(*tables: Mapping[str, Any]) -> Config:
    return resolve(SETTING, *tables)


def configured_tables(config: Config) -> dict[str, Any]:
    """The keys of a configuration that make the work what it is."""
    tables = as_tables(config)
    return {name: tables[name] for name in ("seed", "method", "model", "data", "clients", "train")}


def play(context: RunContext) -> Iterator[tuple[Server, RoundCounts]]:
    """The rounds from the method's first state, one at a `next`."""
    with connected(context, None) as connection:
        yield from _rounds(context, connection)


def _rounds(context: RunContext, connection: Connection) -> Iterator[tuple[Server, RoundCounts]]:
    server = Server(0, context.method.init(context.setup))
    while server.round < context.setup.rounds:
        server, counts, _ = play_round(connection.federation, server)
        if counts.failed:
            raise RuntimeError(f"clients failed: {counts.failed}")
        yield server, counts


def accuracy(context: RunContext) -> float:
    """Test accuracy after the last round."""
    with connected(context, None) as connection:
        *_, (server, _) = _rounds(context, connection)
        scores, _ = evaluate(connection.federation, server, connection.panel)
    return float(scores["accuracy"])


def side(context: RunContext, rounds: int = 1, passes: int = 1) -> Side:
    """So many rounds a repetition, going on where the last one stopped; an example is trained on `passes` times a round. What
    counts is the time in the transport: training and all that a client does around it, without aggregation and evaluation."""
    played = play(context)
    clients = [context.train[c.id] for c in context.setup.clients]

    def run() -> Sample:
        seconds = sum(next(played)[1].exchange_s for _ in range(rounds))
        return work(seconds, clients, rounds * passes)

    return run


def work(seconds: float, clients: Sequence[Encoded], times: int) -> Sample:
    """A sample of so many passes over the clients' examples."""
    tokens = sum(len(ids) for data in clients for ids in data.inputs)
    return Sample(seconds, times * sum(map(len, clients)), times * tokens)


def weights(context: RunContext) -> int:
    """Frozen weights in the adapted layers."""
    return sum(d_out * d_in for d_out, d_in in context.setup.shapes.values())


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
