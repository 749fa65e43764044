"""What a run would be, before it is: who takes part, what crosses the wire, how long it takes. Nothing is written.

Bytes are of the method's real messages, in rounds whose training is made up (`runs.costs`); minutes come from a few real steps of
the first round's clients, and from scoring a few test texts.
"""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice

import numpy as np
import torch

from fedlora import wire
from fedlora.config import Config, HeadMode
from fedlora.listener import Listener
from fedlora.messages import TrainAsk
from fedlora.models.quantised import bits as quantised_bits
from fedlora.models.quantised import count
from fedlora.names import counted
from fedlora.runs import fit
from fedlora.runs.connect import initial_head, make_worker
from fedlora.runs.context import RunContext
from fedlora.runs.costs import Round, made_up_rounds
from fedlora.runs.prepare import prepare
from fedlora.server.sampling import sampler
from fedlora.training.length import examples_of
from fedlora.training.score import ScoreJob
from fedlora.types import Train

ROUNDS = 4  # made-up ones; later ones are taken to be like the last two of them
STEPS = 3  # measured ones, after one to warm up
TEXTS, QUICK = (8, 64), 2.0  # scored ones: a few, and more of them where that took less than so many seconds


class _Enough(Exception):
    """The steps are measured."""


@dataclass(frozen=True)
class Pace:
    """Examples a second, in training and in scoring; `trained` counts the parameters that a client trains at first."""

    training: float
    scoring: float
    trained: int


def rehearse(config: Config, listener: Listener) -> str:
    """The plan of a run, for people. BadInput where the run itself would be refused."""
    context = prepare(config, listener)
    listener.stage("measuring a few steps")
    pace = _pace(context)
    listener.stage(f"playing {counted(min(ROUNDS, context.setup.rounds), 'round')} with made-up training")
    start = time.perf_counter()
    participants = sampler(context.setup.clients, context.setup.seed, config.clients.sample)
    heads = wire.measure(context.trainer.head).total if config.model.head is HeadMode.SHARED else 0
    rounds = made_up_rounds(
        context.method, context.setup, lambda setup, t: participants(t), context.transforms, _mean_examples(context)
    )
    played = [
        replace(each, upload_bytes=each.upload_bytes + more, download_bytes=each.download_bytes + more)
        for t, each in enumerate(islice(rounds, ROUNDS), 1)
        for more in [heads * len(participants(t))]
    ]
    serving = (time.perf_counter() - start) / len(played)
    return "\n".join(_lines(context, pace, played, serving))


def over_all(values: Sequence[float], rounds: int) -> float:
    """The sum over so many rounds of what is known of the first ones; the later are like the last two of these, for some methods
    take turns."""
    last = values[-2:]
    return sum(values[:rounds]) + max(0, rounds - len(values)) * sum(last) / len(last)


def _mean_examples(context: RunContext) -> Callable[[Train], float]:
    """How many examples a request trains on, on average over the clients that have some: who takes part in later rounds is like all
    of them."""

    @cache
    def mean(epochs: int | None, max_steps: int | None, domain: str) -> float:
        sizes = [c.domains.get(domain, 0) if domain else c.num_examples for c in context.setup.clients]
        ask = Train({}, frozenset(), epochs, max_steps)
        found = [examples_of(ask, size, context.config.train) for size in sizes if size]
        return sum(found) / max(1, len(found))

    return lambda ask: mean(ask.epochs, ask.max_steps, ask.data)


def _pace(context: RunContext) -> Pace:
    """Real steps of the clients of the first round, on the first batches of each."""
    times, counts = [], []

    def heard(examples: int) -> None:
        times.append(time.perf_counter())
        counts.append(examples)
        if len(counts) > STEPS:
            raise _Enough

    few = (1 + STEPS) * context.config.train.batch_size
    data = {id: own.take(np.arange(min(len(own), few))) for id, own in context.train.items()}
    worker = make_worker(replace(context, train=data), None, 0, heard)
    state = context.method.init(context.setup)
    shared = initial_head(context)
    clients = sampler(context.setup.clients, context.setup.seed, context.config.clients.sample)(1)
    asks = [TrainAsk(1, client, context.method.send(state, client, 1), shared) for client in clients]
    first = next(context.method.local(asks[0].down, context.method.hold(context.setup, clients[0]), clients[0], 1))
    trained = worker.trained_bytes(first, clients[0]) // 4
    start = time.perf_counter()
    with suppress(_Enough):
        list(worker.answer(asks))
    training = sum(counts[1:]) / (times[-1] - times[0]) if len(counts) > 1 else sum(counts) / (times[-1] - start)
    scoring = 0.0
    for texts in TEXTS:
        some = context.test.take(np.unique(np.linspace(0, len(context.test) - 1, texts).astype(int)))
        start = time.perf_counter()
        list(context.trainer.sums([ScoreJob(context.method.deploy(state), shared, some)]))
        took = time.perf_counter() - start
        scoring = len(some) / took
        if took > QUICK:
            break
    return Pace(training, scoring, trained)


def _lines(context: RunContext, pace: Pace, played: Sequence[Round], serving: float) -> list[str]:
    setup, train, things = context.setup, context.config.train, context.dataset.things
    present = len(sampler(setup.clients, setup.seed, context.config.clients.sample)(1))
    sizes = [client.num_examples for client in setup.clients]
    ranks = sorted(set(setup.ranks.values()))
    up, down = [each.upload_bytes for each in played], [each.download_bytes for each in played]
    parameters = sum(map(count, context.trainer.base.model.parameters()))
    bits = quantised_bits(context.trainer.base.model)
    examples = over_all([each.examples for each in played], setup.rounds)
    scorings = -(-setup.rounds // train.evaluate_every)
    seconds = examples / pace.training + scorings * len(context.test) / pace.scoring + setup.rounds * serving
    dtype = str(context.trainer.dtype).removeprefix("torch.")
    needs = fit.table(context.config, context.method, setup, context.trainer, context.all_train)
    return [
        f"model     {context.config.model.source}: {parameters:,} parameters, {f'{bits}, ' if bits else ''}"
        f"{dtype} on {context.trainer.device.type}",
        f"trained   {context.method.FACTS.title}: {pace.trained:,} parameters a client, on {len(setup.shapes)} layers, "
        f"rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}, head {context.config.model.head.value}",
        f"data      {context.dataset.name}: {len(context.dataset.train):,} training and {len(context.test):,} test {things} of "
        f"{len(context.dataset.strata_names)} {context.dataset.strata_kind}",
        f"clients   {len(sizes)}, {present} a round; training {things}: {min(sizes):,} the fewest, "
        f"{statistics.median(sizes):,.0f} the median, {max(sizes):,} the most",
        f"a round   up {sum(up) / len(up) / 1e6:.2f} MB  down {sum(down) / len(down) / 1e6:.2f} MB, over the first {len(played)}",
        f"in all    up {over_all(up, setup.rounds) / 1e6:.2f} MB  down {over_all(down, setup.rounds) / 1e6:.2f} MB, "
        f"{counted(setup.rounds, 'round')}",
        f"memory    {needs[-1][1]} by estimate: {', '.join(f'{name} {size}' for name, size in needs[:-1])}; "
        f"{_memory(context.trainer.device) / 1e9:.1f} GB at the most so far",
        f"time      {_duration(seconds)}: {pace.training:.0f} {things} a second in training, {pace.scoring:.0f} in scoring",
    ]


def _memory(device: torch.device) -> int:
    """The most bytes that were in use, on the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
