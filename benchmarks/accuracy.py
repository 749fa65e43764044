"""Whether speed costs accuracy: our fp32 against PEFT's loop after the same rounds, and our bf16 against our fp32, paired by seed.

A pair has the same data, split, random head, first adapter and order of batches. What is given is the mean difference in test
accuracy and its 95 % t interval over the seeds, in points. BANKING77, MiniLM, 30 clients Dir(0.1). Takes hours in full; pairs are
computed side by side, a process a core, each is written when it is done, and those that the results have already are not repeated.
A CPU without bf16 arithmetic computes as one that has it would (benchmarks/bf16.py).
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn
from scipy.stats import ttest_1samp

from benchmarks import harness, ours, training
from benchmarks.bf16 import Widened
from benchmarks.harness import Row
from benchmarks.peers import peft_loop
from fedlora.runs.context import RunContext
from fedlora.training.precision import pick_device, pick_dtype

PEERS, PRECISION = 0.1, 0.5  # the targets: of the mean difference, in points
METHODS = ("lora-a2", "fedit", "flexlora")

Pair = Callable[[int], tuple[float, float]]  # seed -> the accuracies to compare


def final_of_peft(context: RunContext) -> float:
    """Test accuracy of PEFT's fp32 loop after as many rounds, from the same start."""
    loop = training.peft(context)
    rank = context.config.clients.rank
    assert isinstance(rank, int)
    state = peft_loop.as_state(context.setup.fresh(rank))
    clients = {c.id: context.train[c.id] for c in context.setup.clients if c.num_examples}
    for number in range(1, context.setup.rounds + 1):
        state, _ = loop.round(clients, state, number)
    return loop.accuracy(state, context.test)


def against_peft(tables: Mapping[str, Any], seed: int) -> tuple[float, float]:
    context = ours.context(tables, {"seed": seed, "precision": "fp32"})
    return ours.accuracy(context), final_of_peft(context)


def bf16_against_fp32(tables: Mapping[str, Any], seed: int) -> tuple[float, float]:
    bf16, fp32 = (ours.context(tables, {"seed": seed, "precision": p}) for p in ("bf16", "fp32"))
    with nullcontext() if _native() == torch.bfloat16 else Widened():  # type: ignore[no-untyped-call]
        first = ours.accuracy(bf16)
    return first, ours.accuracy(fp32)


def _native() -> torch.dtype:
    return pick_dtype("auto", pick_device("cpu"))


@dataclass(frozen=True)
class Comparison:
    """What is compared over so many seeds; `target` is the largest mean difference, in points."""

    name: str
    pair: Pair
    seeds: int
    target: float
    config: Mapping[str, Any]


def paired(comparison: Comparison, pairs: Mapping[int, tuple[float, float]]) -> Row:
    """The mean of first minus second over the seeds, in points, with its interval."""
    own = [pairs[seed] for seed in sorted(pairs)]
    differences = [100 * (a - b) for a, b in own]
    row: Row = {
        "comparison": comparison.name,
        "seeds": len(own),
        "first, %": 100 * sum(a for a, _ in own) / len(own),
        "second, %": 100 * sum(b for _, b in own) / len(own),
        "difference, points": sum(differences) / len(own),
    }
    if len(own) > 1:
        low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
        row |= {"95 % from": float(low), "to": float(high)}
    by_seed = {str(seed): list(pairs[seed]) for seed in sorted(pairs)}
    return row | {"target": f"within {comparison.target:g}", "pairs": by_seed, "config": comparison.config}


def known(comparison: Comparison, rows: Sequence[Row]) -> dict[int, tuple[float, float]]:
    """Pairs of the same configuration in earlier results, by seed."""
    config = json.loads(json.dumps(comparison.config))
    same = (row for row in rows if row["comparison"] == comparison.name and row["config"] == config)
    return {int(seed): (a, b) for row in same for seed, (a, b) in row["pairs"].items()}


def main(
    quick: bool = False,
    limit: int = 0,
    rounds: int = 3,
    seeds: int = 5,
    precision_limit: int = 0,
    precision_rounds: int = 3,
    precision_seeds: int = 3,
    precision_batch_size: int = 32,
    lr: float = 5e-3,
    jobs: int = 0,
    again: bool = False,
) -> None:
    """Paired differences in test accuracy; --precision-... is of bf16 against fp32. A limit of 0 is the whole data set; smaller
    batches make as many steps of less data. --jobs 0 is a process a core; --again repeats the pairs that the results have
    already."""
    if quick:
        limit, rounds, seeds, precision_limit, precision_rounds, precision_seeds = 40, 1, 2, 40, 1, 0

    def tables(limit: int, rounds: int, batch_size: int = 32, method: str = "fedit") -> dict[str, Any]:
        data = {"data": {"limit": limit}} if limit else {}
        return {"method": {"name": method}, "train": {"lr": lr, "rounds": rounds, "batch_size": batch_size}} | data

    def comparison(name: str, pair: Callable[..., tuple[float, float]], seeds: int, target: float, own: Any) -> Comparison:
        return Comparison(name, partial(pair, own), seeds, target, ours.configured_tables(ours.configured(own)))

    todo = [comparison("fedlora - PEFT fp32, FedIT", against_peft, seeds, PEERS, tables(limit, rounds))]
    for method in METHODS:
        own = tables(precision_limit, precision_rounds, precision_batch_size, method)
        todo.append(comparison(f"{method}, bf16 - fp32", bf16_against_fp32, precision_seeds, PRECISION, own))
    facts = {
        "fedlora's own precision": str(_native()).removeprefix("torch."),
        "bf16 by": "its own units" if _native() == torch.bfloat16 else "fp32 products of bf16 numbers, rounded to bf16",
    }
    rows = [] if quick or again else harness.rows("accuracy")
    done = {each.name: known(each, rows) for each in todo}
    play(todo, done, jobs or os.cpu_count() or 1, lambda: quick or harness.save("accuracy", summary(todo, done), facts))
    title = "accuracy: paired differences, BANKING77, MiniLM, 30 clients Dir(0.1)"
    harness.finish("accuracy", title, summary(todo, done), facts, quick)


def play(
    todo: Sequence[Comparison], done: Mapping[str, dict[int, tuple[float, float]]], jobs: int, then: Callable[[], object]
) -> None:
    """Fill `done` with the pairs that it lacks, so many at a time; `then` hears of each."""
    threads = max(1, torch.get_num_threads() // jobs)
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn())
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool,
        Progress(*columns, console=harness.console) as progress,
    ):
        missing = [(each, seed) for each in todo for seed in range(each.seeds) if seed not in done[each.name]]
        waiting = {pool.submit(each.pair, seed): (each.name, seed) for each, seed in missing}
        bar = progress.add_task("pairs", total=len(waiting))
        for future in as_completed(waiting):
            name, seed = waiting[future]
            done[name][seed] = future.result()
            progress.advance(bar)
            then()


def summary(todo: Sequence[Comparison], done: Mapping[str, Mapping[int, tuple[float, float]]]) -> list[Row]:
    return [paired(each, done[each.name]) for each in todo if done[each.name]]


if __name__ == "__main__":
    harness.command(main)
