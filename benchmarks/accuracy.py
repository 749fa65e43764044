"""Whether speed costs accuracy: ours against PEFT's loop after the same rounds, and our bf16 against our fp32, paired by seed.

A pair has the same data, split, random head, first adapter and order of batches. What is given is the mean difference in test
accuracy and its 95 % t interval over the seeds, in points. BANKING77, MiniLM, 30 clients Dir(0.1). Takes hours in full; pairs are
computed side by side, a process a core, and each is written when it is done. A CPU without bf16 arithmetic computes as one that
has it would (benchmarks/bf16.py).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
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
from fedlora.engine.run import World
from fedlora.training.precision import pick_device, pick_dtype

PEERS, PRECISION = 0.5, 1.0  # the targets: of the mean difference, in points
METHODS = ("lora-a2", "fedit", "flexlora")

Pair = Callable[[int], tuple[float, float]]  # seed -> the accuracies to compare


def final_of_peft(world: World) -> float:
    """Test accuracy of PEFT's fp32 loop after as many rounds, from the same start."""
    loop = training.peft(world)
    rank = world.config.clients.rank
    assert isinstance(rank, int)
    state = peft_loop.as_state(world.setup.fresh(rank))
    clients = {c.id: world.train[c.id] for c in world.setup.clients if c.num_examples}
    for number in range(1, world.setup.rounds + 1):
        state, _ = loop.round(clients, state, number)
    return loop.accuracy(state, world.test)


def against_peft(tables: Mapping[str, Any], seed: int) -> tuple[float, float]:
    world = ours.world(tables, {"seed": seed})
    return ours.accuracy(world), final_of_peft(world)


def bf16_against_fp32(tables: Mapping[str, Any], method: str, seed: int) -> tuple[float, float]:
    bf16, fp32 = (ours.world(tables, {"seed": seed, "precision": p, "method": {"name": method}}) for p in ("bf16", "fp32"))
    with nullcontext() if _native() == torch.bfloat16 else Widened():  # type: ignore[no-untyped-call]
        first = ours.accuracy(bf16)
    return first, ours.accuracy(fp32)


def _native() -> torch.dtype:
    return pick_dtype("auto", pick_device("cpu"))


def paired(comparison: str, pairs: Sequence[tuple[float, float]], target: float) -> Row:
    """The mean of first minus second in points, with its interval."""
    differences = [100 * (a - b) for a, b in pairs]
    row: Row = {
        "comparison": comparison,
        "seeds": len(pairs),
        "first, %": 100 * sum(a for a, _ in pairs) / len(pairs),
        "second, %": 100 * sum(b for _, b in pairs) / len(pairs),
        "difference, points": sum(differences) / len(pairs),
    }
    if len(pairs) > 1:
        low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
        row |= {"95 % from": float(low), "to": float(high)}
    return row | {"target": f"within {target:g}", "pairs": [list(pair) for pair in pairs]}


def main(
    quick: bool = False,
    limit: int = 0,
    rounds: int = 3,
    seeds: int = 5,
    precision_limit: int = 0,
    precision_rounds: int = 3,
    precision_seeds: int = 3,
    lr: float = 5e-3,
    jobs: int = 0,
) -> None:
    """Paired differences in test accuracy. A limit of 0 is the whole data set; --seeds 0 or --precision-seeds 0 leaves a part
    out. --jobs 0 is a process a core."""
    if quick:
        limit, rounds, seeds, precision_limit, precision_rounds, precision_seeds = 40, 1, 2, 40, 1, 0

    def setting(limit: int, rounds: int) -> dict[str, Any]:
        return {"train": {"lr": lr, "rounds": rounds}} | ({"data": {"limit": limit}} if limit else {})

    todo: dict[str, tuple[Pair, int, float]] = {
        "fedlora - PEFT fp32, FedIT": (partial(against_peft, setting(limit, rounds)), seeds, PEERS)
    }
    for method in METHODS:
        pair = partial(bf16_against_fp32, setting(precision_limit, precision_rounds), method)
        todo[f"{method}, bf16 - fp32"] = pair, precision_seeds, PRECISION
    facts = {
        "fedlora's own precision": str(_native()).removeprefix("torch."),
        "bf16 by": "its own units" if _native() == torch.bfloat16 else "fp32 products of bf16 numbers, rounded to bf16",
        "config against PEFT": ours.configured_tables(ours.configured(setting(limit, rounds))),
        "config of bf16 against fp32": ours.configured_tables(ours.configured(setting(precision_limit, precision_rounds))),
    }
    done: dict[str, dict[int, tuple[float, float]]] = {comparison: {} for comparison in todo}

    def summary() -> list[Row]:
        own = {comparison: [pairs[seed] for seed in sorted(pairs)] for comparison, pairs in done.items() if pairs}
        return [paired(comparison, pairs, todo[comparison][2]) for comparison, pairs in own.items()]

    jobs = jobs or os.cpu_count() or 1
    threads = max(1, torch.get_num_threads() // jobs)
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn())
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool,
        Progress(*columns, console=harness.console) as progress,
    ):
        waiting = {
            pool.submit(pair, seed): (comparison, seed) for comparison, (pair, count, _) in todo.items() for seed in range(count)
        }
        bar = progress.add_task("pairs", total=len(waiting))
        for future in as_completed(waiting):
            comparison, seed = waiting[future]
            done[comparison][seed] = future.result()
            progress.advance(bar)
            if not quick:
                harness.save("accuracy", summary(), facts)
    harness.finish("accuracy", "accuracy: paired differences, BANKING77, MiniLM, 30 clients Dir(0.1)", summary(), facts, quick)


if __name__ == "__main__":
    harness.command(main)
