"""What each method sends, measured on its real messages: the table of docs/methods.md.

    python -m fedlora.runs.costs docs/methods.md                  every method, some minutes
    python -m fedlora.runs.costs docs/methods.md --only rbla      some seconds; the other rows stay as they are

Ten clients play four rounds with RoBERTa-base's shapes at rank 8 on all 72 linear layers of its blocks. A second run is long, and
its clients skip rounds: half of six are drawn anew for each of sixty rounds. Its blocks are narrow. Methods that merge into the
base send what a client missed as factor pairs or, where that is less, as one dense sum; here the pairs of all of them come to
outweigh the sum: FLoRA's after 2 rounds, FedEx-LoRA's after 3, FRLoRA's after 6, and FedLoRU's, which merges every eighth round,
after 48. With RoBERTa-base's shapes, whose sum weighs as much as pairs of 512 ranks, FedLoRU's never would.

Training is made up (every trained entry moves at random), messages and aggregation are real; what is counted is the mean over all
turns of a client.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora import methods, seeds, tasks, wire
from fedlora.disk import write_whole
from fedlora.runs.prepare import fresh_adapter
from fedlora.transforms.pipeline import UNCHANGED, Pipeline
from fedlora.types import (
    BASE,
    GATE,
    Client,
    Facts,
    Features,
    Local,
    Method,
    Observe,
    Observed,
    Reply,
    Router,
    Setup,
    Tensors,
    Train,
    Trained,
)

RANK = 8
CLIENTS, ROUNDS = 10, 4
LONG_CLIENTS, LONG_ROUNDS = 6, 60
BLOCKS, HIDDEN = 12, 768  # RoBERTa-base
NARROW = 64  # the blocks of the long run
CLASSES = 20
ENCODER = 124_055_040  # its parameters without pooler and head, which full fine-tuning sends


@dataclass(frozen=True)
class Cost:
    """Of one client in one round, on average."""

    upload_bytes: float
    download_bytes: float


def roberta_setup() -> Setup:
    """RoBERTa-base's shapes, without its weights."""
    return _setup(HIDDEN, CLIENTS, ROUNDS, ENCODER)


def long_setup() -> Setup:
    """The long run: narrow blocks, and nothing beside them."""
    return _setup(NARROW, LONG_CLIENTS, LONG_ROUNDS)


def _setup(hidden: int, clients: int, rounds: int, parameters: int = 0) -> Setup:
    sides = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (4 * hidden, hidden),
        "output.dense": (hidden, 4 * hidden),
    }
    shapes = {f"roberta.encoder.layer.{i}.{name}": side for i in range(BLOCKS) for name, side in sides.items()}
    weights: dict[str, tuple[int, ...]] = {f"{m}.weight": side for m, side in shapes.items()}
    if parameters:
        weights["everything.else"] = (parameters - sum(o * i for o, i in shapes.values()),)
    scaling = {r: 16.0 / r for r in range(1, 65)}

    def fresh(rank: int) -> Any:
        return fresh_adapter(shapes, 0, scaling, rank)

    def base(m: str) -> Tensor:
        return torch.from_numpy(seeds.generator(0, "made-up base", m).normal(0, 0.02, shapes[m])).float()

    everybody = tuple(Client(i, RANK, 1000) for i in range(clients))
    return Setup(shapes, weights, everybody, rounds, 1, 0, 16.0, False, fresh, base)


def half(setup: Setup, t: int) -> Sequence[Client]:
    """Who takes part in a round of the long run."""
    drawn = seeds.generator(0, "who takes part", t).choice(len(setup.clients), len(setup.clients) // 2, replace=False)
    return [setup.clients[i] for i in sorted(drawn)]


def cost(method: Method, setup: Setup, present: Callable[[Setup, int], Sequence[Client]] = lambda setup, t: setup.clients) -> Cost:
    """Play made-up rounds with who is present in each, and count the messages."""
    rounds = list(made_up_rounds(method, setup, present))
    turns = sum(len(present(setup, t)) for t in range(1, setup.rounds + 1))
    return Cost(sum(each.upload_bytes for each in rounds) / turns, sum(each.download_bytes for each in rounds) / turns)


@dataclass(frozen=True)
class Round:
    """Of all clients of a round together; `examples` is what they train on, rehearsals included."""

    upload_bytes: int
    download_bytes: int
    examples: float


def made_up_rounds(
    method: Method,
    setup: Setup,
    present: Callable[[Setup, int], Sequence[Client]],
    transforms: Pipeline = UNCHANGED,
    examples: Callable[[Train], float] = lambda ask: 0.0,
) -> Iterator[Round]:
    """Play made-up rounds with who is present in each; `examples` says how many a request trains on."""
    state = method.init(setup)
    held = {client.id: method.hold(setup, client) for client in setup.clients}
    up, down, seen = 0, 0, 0.0

    def answer(t: int, client: Client, ask: Train | Observe) -> Trained | Observed:
        nonlocal seen
        if isinstance(ask, Train):
            seen += examples(ask)
        return make_up(ask, setup, t, client)

    def replies(t: int) -> Iterator[Reply]:
        nonlocal up, down
        for client in present(setup, t):
            order = method.send(state, client, t)
            local = method.local(order, held[client.id], client, t)
            message, held[client.id] = played(local, partial(answer, t, client))
            up += transforms.measure(transforms.pack(message, {}, t, client)[0]).total
            down += wire.measure(order).total
            yield Reply(client, message)

    for t in range(1, setup.rounds + 1):
        up, down, seen = 0, 0, 0.0
        state, _ = method.aggregate(state, replies(t), t)
        yield Round(up, down, seen)


def played(local: Local, answer: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What a client sends and keeps, its requests answered."""
    try:
        ask = next(local)
        while True:
            ask = local.send(answer(ask))
    except StopIteration as end:
        message, held = end.value
        return message, held


def table(known: Mapping[str, str] | None = None) -> str:
    """The markdown page. `known` are rows, by method, that are not measured again."""
    once, long = roberta_setup(), long_setup()

    def row(name: str) -> str:
        if known and name in known:
            return known[name]
        method = methods.make(name, {})
        return _row(name, method.FACTS, cost(method, once), cost(method, long, half))

    return "\n".join([*HEADING, *map(row, methods.names()), ""])


def rows_of(page: str) -> dict[str, str]:
    """Method -> its row of the page."""
    return {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}


def main() -> None:
    """Write the page that the command line names, or some of its rows."""
    arguments = ArgumentParser(prog="python -m fedlora.runs.costs")
    arguments.add_argument("page", type=Path)
    arguments.add_argument("--only", nargs="+", choices=methods.names(), default=methods.names(), metavar="METHOD")
    asked = arguments.parse_args()
    there = rows_of(asked.page.read_text()) if asked.page.exists() else {}
    write_whole(asked.page, table({name: row for name, row in there.items() if name not in asked.only}).encode())


HEADING = [
    "# Methods",
    "",
    "Made by `python -m fedlora.runs.costs docs/methods.md`; do not edit. MB are what one client sends and receives in a round",
    f"on average, encoded, with RoBERTa-base's shapes at rank {RANK}, {CLIENTS} clients that all take part, {ROUNDS} rounds. The",
    f"long run has {LONG_ROUNDS} rounds, {LONG_CLIENTS} clients, half of them drawn anew for each round, and {BLOCKS} blocks of",
    f"width {NARROW}, where pairs of a few rounds outweigh the weights: who missed more receives the whole change of the base",
    "instead. *Exact*: the server's update equals the weighted mean of the clients' updates B_k A_k. Server cost is of one module",
    "in one round: K clients, rank r, R the sum of ranks, d = d_out + d_in. *Tasks*: those that have what its requests use.",
    "",
    "| method | paper | year | exact | mixed ranks | personal | tasks | MB up | MB down | long: MB up | long: MB down "
    "| upload, a module | download, a module | server |",
    f"|{'---|' * 14}",
]


def _row(name: str, facts: Facts, once: Cost, long: Cost) -> str:
    tick = {True: "yes", False: "no"}
    cells = [
        f"`{name}`",
        f"[{facts.title}](https://arxiv.org/abs/{facts.paper})" if facts.paper[:4].isdigit() else f"{facts.title} ({facts.paper})",
        str(facts.year),
        *(tick[flag] for flag in (facts.exact, facts.mixed_ranks, facts.personal)),
        served(facts),
        *(f"{size / 1e6:.2f}" for c in (once, long) for size in (c.upload_bytes, c.download_bytes)),
        facts.upload,
        facts.download,
        facts.server,
    ]
    return f"| {' | '.join(cells)} |"


def served(facts: Facts) -> str:
    """The tasks that a method can train, in words."""
    lacking = [f"`{name}`" for name in tasks.names() if facts.asks & tasks.find(name).LACKS]
    return f"all but {', '.join(lacking)}" if lacking else "all"


def make_up(ask: Train | Observe, setup: Setup, t: int, client: Client) -> Trained | Observed:
    """What training or looking at data could have answered."""
    draw = torch.Generator().manual_seed(seeds.derive(0, "made up", t, client.id))
    hidden = min(d_in for _, d_in in setup.shapes.values())

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    if isinstance(ask, Observe):
        if isinstance(ask.statistic, Features):
            return Observed({"features": noise(ask.statistic.count, hidden)})
        k = ask.statistic.components
        return Observed(
            {
                "labels": torch.arange(CLASSES),
                "counts": torch.full((CLASSES,), 50),
                "weights": torch.full((CLASSES, k), 1 / k),
                "means": noise(CLASSES, k, hidden),
                "variances": noise(CLASSES, k, hidden).square(),
            }
        )
    slots, full, gate, grad = dict(ask.slots), {}, ask.gate, {}
    for slot, role in sorted(ask.roles):
        if slot == BASE:
            names = ask.mask.get((BASE, "W"), setup.params)
            full = {n: noise(*setup.params[n]).mul_(1e-4) for n in names}
        elif slot == GATE and isinstance(gate, Router):
            gate = replace(gate, G={m: g + 1e-3 * noise(*g.shape) for m, g in gate.G.items()})
        else:
            slots[slot] = slots[slot].with_role(role, _moved(slots[slot].role(role), ask.mask.get((slot, role)), noise))
            grad[slot, role] = {m: noise(*x.shape) for m, x in slots[slot].role(role).items()} if ask.want_grad else {}
    return Trained(slots, 0.0, 1, full, grad, gate)


def _moved(start: Tensors, mask: Mapping[str, Tensor] | None, noise: Any) -> dict[str, Tensor]:
    moved = {m: x + 1e-3 * noise(*x.shape) for m, x in start.items()}
    return moved if mask is None else {m: torch.where(mask[m].bool(), moved[m], x) for m, x in start.items()}


if __name__ == "__main__":
    main()
