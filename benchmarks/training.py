"""A round of training, ours against the peers' on the same examples: what `train-short` and `train-long` measure."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, ours
from benchmarks.against import OURS, version, versions
from benchmarks.harness import Measured, Sample, Side
from benchmarks.peers import flower_sim, peft_loop
from benchmarks.peers.peft_loop import Loop
from fedlora.runs.context import RunContext

FP32, BF16, FLOWER = "(a) PEFT fp32", "(b) PEFT bf16 autocast", "(c) Flower simulation"


def peft(context: RunContext, autocast: torch.dtype | None = None, rank: int | None = None) -> Loop:
    """A PEFT loop over the model of a context of ours, on the CPU."""
    config = context.config
    own = config.clients.rank if rank is None else rank
    assert isinstance(own, int)
    model = peft_loop.load(config.model.source, len(context.roster.schema.label_names), config.seed)
    model = peft_loop.adapted(model, own, config.model.lora_alpha, list(context.setup.shapes))
    return Loop(model, config.train, context.trainer.pad, config.seed, autocast=autocast)


def peft_side(context: RunContext, autocast: torch.dtype | None = None) -> Side:
    """A round of the loop a repetition, from the adapter that ours starts with."""
    loop = peft(context, autocast)
    assert isinstance(context.config.clients.rank, int)
    return peft_loop.side(loop, context.train, peft_loop.as_state(context.setup.fresh(context.config.clients.rank)))


def flower_side(context: RunContext, folder: Path) -> Side:
    """A round of a simulation a repetition; Ray starts and stops outside the clock."""
    job = flower_sim.describe(context, [context.train[c.id] for c in context.setup.clients], folder)

    def run() -> Sample:
        (row,) = flower_sim.play(job)
        harness.console.print(
            f"  [dim]{FLOWER}: {row.load_s:.1f} s to build models, {row.train_s:.1f} s to train, over all workers"
        )
        return Sample(row.exchange_s, row.examples, row.tokens)

    return run


def measure(context: RunContext, tables: Mapping[str, Any], repetitions: int) -> Measured:
    """Everybody's rounds, one a repetition, taking turns. The context is of these tables."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temp, version(tables) as own:
        sides: dict[str, Side] = {OURS: own, FP32: peft_side(context)}
        peak = harness.peak()
        if peak["bf16"] > peak["fp32"]:
            sides[BF16] = peft_side(context, torch.bfloat16)
        else:
            harness.console.print(
                f"{BF16} is not measured: this CPU has no bf16 arithmetic of its own ({peak['bf16'] / 1e9:.0f} GFLOP/s against "
                f"{peak['fp32'] / 1e9:.0f} in fp32), so autocast would only slow PEFT down; fedlora computes in fp32 here, too"
            )
        if flower_sim.installed():
            sides[FLOWER] = flower_side(context, Path(temp))
        else:
            harness.console.print("Flower is not installed here, so it is not measured: pip install -e '.[bench]'")
        return harness.interleave(sides, repetitions)


def run(
    name: str,
    title: str,
    tables: Mapping[str, Any],
    targets: Mapping[str, float],
    repetitions: int,
    quick: bool,
    against: str = "",
) -> None:
    """Measure, show and keep one comparison: with the peers, or with an earlier version of ours, which is kept by itself."""
    few = {"clients": {"count": 6}} if quick else {}
    context = ours.context(tables, few, {"train": {"rounds": repetitions}})
    if against:
        with versions(against, {**tables, **few}) as sides:
            measured = harness.interleave(sides, repetitions)
    else:
        measured = measure(context, {**tables, **few}, repetitions)
    rows = harness.speeds(measured, ours.weights(context), targets)
    name = f"{name}-against" if against else name
    harness.finish(name, title, rows, facts(context, measured) | {"repetitions": repetitions}, quick)


def facts(context: RunContext, measured: Measured) -> dict[str, Any]:
    """What was run, and on which peak the shares stand."""
    sizes = [len(context.train[c.id]) for c in context.setup.clients]
    lengths = [len(ids) for data in context.train.values() for ids in data.inputs]
    return {
        "config": ours.configured_tables(context.config),
        "examples": sum(sizes),
        "examples of a client, least and most": [min(sizes), max(sizes)],
        "tokens of a text, mean and most": [sum(lengths) / len(lengths), max(lengths)],
        "frozen weights adapted": ours.weights(context),
        "our precision": str(context.trainer.dtype).removeprefix("torch."),
        "peak GFLOP/s": {name: round(x / 1e9) for name, x in measured.peak.items()},
    }
