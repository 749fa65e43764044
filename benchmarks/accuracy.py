"""Whether speed costs accuracy: ours against PEFT's loop after the same rounds, and our bf16 against our fp32, paired by seed.

A pair has the same data, split, random head, first adapter and order of batches. What is given is the mean difference in test
accuracy and its 95 % t interval over the seeds, in points. BANKING77, MiniLM, 30 clients Dir(0.1). Takes hours in full; every pair
is written when it is done.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from scipy.stats import ttest_1samp

from benchmarks import harness, ours, training
from benchmarks.harness import Row
from benchmarks.peers import peft_loop
from fedlora.engine.run import World
from fedlora.training.precision import pick_device, pick_dtype

PEERS, PRECISION = 0.5, 1.0  # the targets: of the mean difference, in points
METHODS = ("lora-a2", "fedit", "flexlora")


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
    worlds = (ours.world(tables, {"seed": seed, "precision": p, "method": {"name": method}}) for p in ("bf16", "fp32"))
    first, second = map(ours.accuracy, worlds)
    return first, second


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
    precision_rounds: int = 3,
    precision_seeds: int = 3,
    lr: float = 5e-4,
) -> None:
    """Paired differences in test accuracy. --limit 0 is the whole data set; --seeds 0 or --precision-seeds 0 leaves a part out.
    With less data there are fewer steps, and a larger --lr lets them learn something that can differ."""
    limit, rounds, seeds, precision_rounds, precision_seeds = (
        (40, 1, 2, 1, 0) if quick else (limit, rounds, seeds, precision_rounds, precision_seeds)
    )
    data = {"train": {"lr": lr}} | ({"data": {"limit": limit}} if limit else {})
    done: dict[str, tuple[list[tuple[float, float]], float]] = {}

    def play(comparison: str, target: float, count: int, pair: Callable[[int], tuple[float, float]]) -> None:
        for seed in range(count):
            with harness.console.status(f"{comparison}: seed {seed}"):
                done.setdefault(comparison, ([], target))[0].append(pair(seed))
            if not quick:
                harness.save("accuracy", summary(), facts)

    def summary() -> list[Row]:
        return [paired(comparison, pairs, target) for comparison, (pairs, target) in done.items()]

    facts = {
        "fedlora's own precision": str(pick_dtype("auto", pick_device("cpu"))).removeprefix("torch."),
        "limit": limit or "none",
        "rounds against PEFT": rounds,
        "rounds of bf16 against fp32": precision_rounds,
        "config": ours.configured_tables(ours.configured(data)),
    }
    play("fedlora - PEFT fp32, FedIT", PEERS, seeds, partial(against_peft, data | {"train": {"lr": lr, "rounds": rounds}}))
    for method in METHODS:
        tables = data | {"train": {"lr": lr, "rounds": precision_rounds}}
        play(f"{method}, bf16 - fp32", PRECISION, precision_seeds, partial(bf16_against_fp32, tables, method))
    harness.finish("accuracy", "accuracy: paired differences, BANKING77, MiniLM, 30 clients Dir(0.1)", summary(), facts, quick)


if __name__ == "__main__":
    harness.command(main)
