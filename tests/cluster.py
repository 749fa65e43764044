"""Workers in this process that are reached through bytes, as those of other processes are, and all that can go wrong on the way."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny import Silent
from toy import tensors

from fedlora import wire
from fedlora.clients.serve import answered, classes
from fedlora.clients.worker import Worker
from fedlora.config import Config, resolve
from fedlora.messages import Answer, Ask
from fedlora.runs import play
from fedlora.runs.connect import Connect, make_worker
from fedlora.runs.context import RunContext
from fedlora.runs.prepare import load_pretrained, make_method, make_trainer, try_pretrained
from fedlora.runs.roster import read_roster
from fedlora.runs.saved import STATES, load_saved, state_of
from fedlora.summary import read_rows
from fedlora.types import Reply


@dataclass
class Trouble:
    """What befalls messages, each kind with its probability; `met` counts it.

    Attributes:
        dies: a worker, before an exchange or before an answer leaves it; what it has not answered is asked again.
        lost: an answer; it is asked for again.
        late: the same, and the answer comes in a later exchange.
        doubled: an answer that comes twice.
        stops: the server, before an answer reaches it.
    """

    seed: int
    dies: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    doubled: float = 0.0
    stops: float = 0.0
    met: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._draw = np.random.default_rng(self.seed)

    def meets(self, kind: str) -> bool:
        met = bool(self._draw.uniform() < getattr(self, kind))
        self.met[kind] += met
        return met


@dataclass
class Cluster:
    """`count` workers. They outlive their server: another one that is given the same dictionaries finds them as they are."""

    context: RunContext
    out: Path
    count: int
    trouble: Trouble
    workers: dict[int, Worker]
    last: dict[int, dict[int, tuple[str, Reply]]]  # of each worker, what it would send again
    late: list[Answer]

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        yield from self.late
        self.late.clear()
        waiting = {ask.client.id: ask for ask in asks}
        while waiting:
            for number in range(self.count):
                own = [ask for id, ask in waiting.items() if id % self.count == number]
                for answer in self._answers(number, own) if own else ():
                    if self.trouble.meets("stops"):
                        raise KeyboardInterrupt
                    waiting.pop(answer.client, None)
                    yield answer
                    if self.trouble.meets("doubled"):
                        yield answer

    def close(self) -> None: ...

    def _answers(self, number: int, asks: Sequence[Ask]) -> Iterator[Answer]:
        """What arrives of a worker's answers."""
        known = classes(self.context.method)
        if self.trouble.meets("dies"):
            self.workers.pop(number, None)
        if number not in self.workers:
            self.workers[number], self.last[number] = another(self.context, self.out, number), {}
        for answer in answered(self.workers[number], wire.decode(wire.encode(tuple(asks)), known), self.last[number]):
            if self.trouble.meets("dies"):
                self.workers.pop(number)
                return
            if self.trouble.meets("lost"):
                continue
            arrived = wire.decode(wire.encode(answer), known)
            if self.trouble.meets("late"):
                self.late.append(arrived)
                continue
            yield arrived


def another(context: RunContext, out: Path, number: int) -> Worker:
    """A worker with a model of its own."""
    pretrained = load_pretrained(context.config, context.roster.schema)
    findings = try_pretrained(context.config, pretrained)
    trainer = make_trainer(context.config, pretrained, findings, context.trainer.objective)
    trainer.rows = context.trainer.rows
    return make_worker(replace(context, trainer=trainer), out / STATES, 1 + number)


# ---- runs, and what they end with ----------------------------------------------------------------------------------------

TIMES = {"wall_s", "train_s", "evaluate_s", "aggregate_s", "wire_s", "other_s"}
HERE = {"discordance"}  # known only where updates are at hand before they travel
ROUNDS = 6
RANKS = {"rank": [1, 2, 2, 4, 4]}
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "lora-a2": {"clients": RANKS, "model": {"head": "shared"}},
    "flora": {"clients": RANKS},
    "frlora": {},
    "fedsa-lora": {},
    "pfedloru": {"model": {"head": "personal"}, "method": {"period": 2}},
    "feddpa": {},
    "fedlease": {"method": {"min_clients": 3}},
    "fl-tac": {"clients": {"domains": 2}},
}


def configured(world: Path, name: str, **more: Any) -> Config:
    source = [str(world / "data"), str(world / "other.csv")] if name == "fl-tac" else str(world / "data")
    common = {
        "precision": "fp32",
        "method": {"name": name},
        "model": {"source": str(world / "bert")},
        "data": {"source": source},
        "clients": {"count": 5, "rank": 2, "sample": 0.5},
        "train": {"rounds": ROUNDS, "batch_size": 4, "lr": 5e-3, "rows": 1},
    }
    return resolve(common, METHODS[name], more)


def run(config: Config, out: Path, connect: Connect | None = None) -> Path:
    """A run, started again until it is complete."""
    for _ in range(200):
        try:
            play.execute(config, out, out.exists(), Silent(), **({"connect": connect} if connect else {}))
            return out
        except KeyboardInterrupt:
            continue
    raise AssertionError("it never ends")


def rows(out: Path, *without: str) -> list[dict[str, Any]]:
    """What rows say, but for times; `without` are beginnings of other keys."""
    return [
        {key: x for key, x in row.items() if key not in TIMES | HERE and not key.startswith(tuple(without) or ("\0",))}
        for row in read_rows(out)
    ]


def learned(out: Path, config: Config) -> list[torch.Tensor]:
    """All that the server and its clients have in the end."""
    saved = load_saved(out, config, read_roster(out / "federation.json").clients, make_method(config))
    assert saved is not None
    kept = [state_of(out, saved, make_method(config), client) for client in sorted(saved.server.accepted)]
    return tensors([saved.server.state, saved.server.head, [[each.held, each.head, each.memory] for each in kept]])


def same_end(one: Path, other: Path, config: Config) -> None:
    a, b = learned(one, config), learned(other, config)
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    files = [file.relative_to(one) for file in [*one.glob("*/adapter_model.safetensors"), *one.glob("*/model.safetensors")]]
    for file in files:
        x, y = load_file(one / file), load_file(other / file)
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
    tables = [load_file(max(out.glob("arrays/*.safetensors")))["confusion"] for out in (one, other)]
    assert torch.equal(*tables)
