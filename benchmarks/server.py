"""The server's share of a round, one module: a method's `aggregate` against the paper's formula with every matrix formed."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import harness
from benchmarks.peers import dense
from benchmarks.peers.dense import Upload
from fedlora.algebra.lowrank import factored_pays
from fedlora.methods import make
from fedlora.types import SHARED, Client, Factors, Method, Model, Reply, Setup

M = "module"
MIXED, SAME = (2, 4, 8, 16, 32), (16,)  # ranks of the clients, by turns; some methods have one for all
TARGETS = {(4096, 10): 50.0}  # (d, K) -> how many times faster; elsewhere LEAST
LEAST = 0.95
START = 0.02  # size of the common start of B, against a change of size 0.01
ENOUGH_S, LEAST_TIMES, MOST_TIMES = 2.0, 3, 15  # a case is repeated until both sides together took so long
TOO_LONG_S = 20.0  # one repetition is enough where it takes so long


@dataclass(frozen=True)
class Case:
    """A method beside its dense formula.

    Attributes:
        ranks: of the clients, by turns.
        changes: whether clients upload the changes of their factors; the formula gets the factors always.
        formula: (uploads, W) -> A and B, or the new W, or all three.
        by_factors: (d, R) -> whether ours never forms a d x d matrix, for R ranks of all clients together.
        settings: of the method.
    """

    method: str
    ranks: tuple[int, ...]
    changes: bool
    formula: Callable[[Sequence[Upload], Tensor], tuple[Tensor, ...]]
    by_factors: Callable[[int, int], bool]
    settings: Mapping[str, Any] = field(default_factory=dict)


def logged_as_factors(d: int, R: int) -> bool:
    """Whether factors take no more numbers than the matrix: the rule of the log of merges."""
    return d >= 2 * R


CASES = {
    "FlexLoRA": Case("flexlora", MIXED, False, lambda ups, W: dense.flexlora(ups), lambda d, R: factored_pays(d, d, R)),
    "FedEx-LoRA": Case("fedex-lora", SAME, True, dense.fedex_lora, logged_as_factors),
    "FLoRA": Case("flora", MIXED, False, lambda ups, W: (dense.flora(ups, W),), logged_as_factors),
    "FLoRA (stacked)": Case("flora", MIXED, False, lambda ups, W: (dense.flora_stacked(ups, W),), logged_as_factors),
    "LoRA-FAIR": Case(
        "lora-fair", SAME, True, lambda ups, W: dense.lora_fair(ups, 0.01), lambda d, R: d >= R, {"objective": "ridge"}
    ),
    "HetLoRA": Case("hetlora", MIXED, False, lambda ups, W: dense.hetlora(ups), lambda d, R: True),
}


def context(case: Case, d: int, K: int) -> tuple[Method, Any, list[Reply], list[Upload]]:
    """A method, its state at the start of a round, the replies of the clients, and the same for the formula."""
    random = torch.Generator().manual_seed(d + K)
    clients = tuple(Client(k, case.ranks[k % len(case.ranks)], 50 + 37 * k % 400) for k in range(K))
    largest = max(c.rank for c in clients)
    A0, B0 = torch.rand(largest, d, generator=random).sub_(0.5).mul_(2 * d**-0.5), START * torch.randn(d, largest, generator=random)

    def fresh(rank: int) -> Factors:
        return Factors({M: A0[:rank]}, {M: B0[:, :rank]}, setup.scaling(rank))

    setup = Setup({M: (d, d)}, {}, clients, 10, 1, 0, 16.0, False, fresh, lambda m: torch.zeros(d, d))
    method = make(case.method, case.settings)
    Up = import_module(type(method).__module__).Up
    replies, uploads = [], []
    for client in clients:
        start = fresh(client.rank)
        dA = 0.1 * d**-0.5 * torch.randn(client.rank, d, generator=random)
        dB = 0.01 * torch.randn(d, client.rank, generator=random)
        A, B = start.A[M] + dA, start.B[M] + dB
        replies.append(Reply(client, Up(A={M: dA}, B={M: dB}) if case.changes else Up(A={M: A}, B={M: B})))
        uploads.append(Upload(client.num_examples, start.scale, A, B))
    return method, method.init(setup), replies, uploads


def change(model: Model, d: int) -> Tensor:
    """What a deployed model adds to the pre-trained weight."""
    total = model.base.dense.get(M, torch.zeros(d, d)).clone()
    for factors in (*model.base.pairs, *model.slots.values()):
        total += factors.scale * factors.B[M] @ factors.A[M]
    return total


def _enough(times: int, seconds: float) -> bool:
    return times >= MOST_TIMES or (times >= LEAST_TIMES and seconds >= ENOUGH_S) or seconds >= TOO_LONG_S


def measure(name: str, d: int, K: int) -> harness.Row:
    """A row: median seconds of both sides, taking turns, the ratio, and how far the results are apart."""
    case = CASES[name]
    method, state, replies, uploads = context(case, d, K)
    W = torch.zeros(d, d)
    small = context(case, 64, 2)  # so that nobody pays for what is done once
    small[0].aggregate(small[1], iter(small[2]), 1)
    case.formula(small[3], torch.zeros(64, 64))
    ours: list[float] = []
    theirs: list[float] = []
    while not _enough(len(ours), sum(ours) + sum(theirs)):
        start = time.perf_counter()
        after, _ = method.aggregate(state, iter(replies), 1)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = case.formula(uploads, W)
        theirs.append(time.perf_counter() - start)
    model, R = method.deploy(after), sum(len(up.A) for up in uploads)
    scale = model.slots[SHARED].scale if SHARED in model.slots else 1.0
    want = sum((x for x in found if x.shape == (d, d)), W)
    if len(found) > 1:
        want = want + scale * found[1] @ found[0]
    return {
        "method": name,
        "d": d,
        "K": K,
        "R": R,
        "held as": "factors" if case.by_factors(d, R) else "matrix",
        "ours s": statistics.median(ours),
        "dense s": statistics.median(theirs),
        "ours is faster by": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "target": TARGETS.get((d, K), LEAST),
        "largest difference": float((change(model, d) - want).abs().max() / torch.linalg.norm(want)),
        "repetitions": len(ours),
    }


def main(
    quick: bool = False,
    method: Annotated[list[str] | None, typer.Option(help="Only these: " + ", ".join(CASES))] = None,
) -> None:
    """Seconds a module, d x d in float32, for K clients."""
    sizes = [(128, 10)] if quick else [(d, K) for d in (768, 4096) for K in (10, 100)]
    rows = []
    for name in method or CASES:
        for d, K in sizes:
            with harness.console.status(f"{name}, d = {d}, K = {K}"):
                rows.append(measure(name, d, K))
    facts = {
        "ranks": f"{', '.join(map(str, MIXED))} by turns; {SAME[0]} for FedEx-LoRA and LoRA-FAIR, which have one for all",
        "dense": "the paper's formula in float32 with every matrix formed (benchmarks/peers/dense.py)",
        "not counted": "FedEx-LoRA, FLoRA: merging logged factors into a base, and into one sum once the log is too long",
    }
    harness.finish("server", "server: aggregate of one d x d module", rows, facts, quick)


if __name__ == "__main__":
    harness.command(main)
