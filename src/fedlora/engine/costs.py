"""What each method sends, measured on its real messages: the table of docs/methods.md.

    python -m fedlora.engine.costs > docs/methods.md

Ten clients play four rounds with RoBERTa-base's shapes at rank 8 on all 72 linear layers of its blocks. Training is made up (every
trained entry moves at random), messages and aggregation are real; what is counted is the mean over clients and rounds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlora import methods, seeds
from fedlora.engine import wire
from fedlora.engine.federation import fresh_adapter
from fedlora.types import (
    BASE,
    GATE,
    Client,
    Facts,
    Features,
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

CLIENTS, ROUNDS, RANK = 10, 4, 8
BLOCKS, HIDDEN, WIDE = 12, 768, 3072  # RoBERTa-base
CLASSES = 20
ENCODER = 124_055_040  # its parameters without pooler and head, which full fine-tuning sends


@dataclass(frozen=True)
class Cost:
    """Of one client in one round, on average."""

    upload_bytes: float
    download_bytes: float


def roberta_setup() -> Setup:
    """RoBERTa-base's shapes, without its weights."""
    sides = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (WIDE, HIDDEN),
        "output.dense": (HIDDEN, WIDE),
    }
    shapes = {f"roberta.encoder.layer.{i}.{name}": side for i in range(BLOCKS) for name, side in sides.items()}
    weights = {f"{m}.weight": side for m, side in shapes.items()}
    rest = ENCODER - sum(o * i for o, i in weights.values())
    scaling = {r: 16.0 / r for r in range(1, 65)}

    def fresh(rank: int) -> Any:
        return fresh_adapter(shapes, 0, scaling, rank)

    def base(m: str) -> Tensor:
        return torch.from_numpy(seeds.generator(0, "made-up base", m).normal(0, 0.02, shapes[m])).float()

    clients = tuple(Client(i, RANK, 1000) for i in range(CLIENTS))
    return Setup(shapes, weights | {"everything.else": (rest,)}, clients, ROUNDS, 1, 0, 16.0, False, fresh, base)


def cost(method: Method, setup: Setup) -> Cost:
    """Play made-up rounds and count the messages."""
    state = method.init(setup)
    held = {client.id: method.hold(setup, client) for client in setup.clients}
    up = down = 0

    def replies(t: int) -> Iterator[Reply]:
        nonlocal up, down
        for client in setup.clients:
            order = method.send(state, client)
            local = method.local(order, held[client.id], client)
            answer = _make_up(next(local), setup, t, client)
            try:
                while True:
                    answer = _make_up(local.send(answer), setup, t, client)
            except StopIteration as end:
                message, held[client.id] = end.value
            up += wire.measure(message).total
            down += wire.measure(order).total
            yield Reply(client, message)

    for t in range(1, setup.rounds + 1):
        state, _ = method.aggregate(state, replies(t))
    turns = setup.rounds * len(setup.clients)
    return Cost(up / turns, down / turns)


def table() -> str:
    """The markdown page."""
    setup = roberta_setup()
    rows = [_row(name, methods.find(name).FACTS, cost(methods.make(name, {}), setup)) for name in methods.names()]
    return "\n".join([*HEADING, *rows, ""])


HEADING = [
    "# Methods",
    "",
    "Made by `python -m fedlora.engine.costs`; do not edit. MB are what one client sends and receives in a round on average,",
    f"encoded, with RoBERTa-base's shapes at rank {RANK}, {CLIENTS} clients that all take part, {ROUNDS} rounds. *Exact*: the",
    "server's update equals the weighted mean of the clients' updates B_k A_k. Server cost is of one module in one round: K",
    "clients, rank r, R the sum of ranks, d = d_out + d_in.",
    "",
    "| method | paper | year | exact | mixed ranks | personal | MB up | MB down | upload, a module | download, a module | server |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]


def _row(name: str, facts: Facts, c: Cost) -> str:
    tick = {True: "yes", False: "no"}
    cells = [
        f"`{name}`",
        f"[{facts.title}](https://arxiv.org/abs/{facts.paper})" if facts.paper[:4].isdigit() else f"{facts.title} ({facts.paper})",
        str(facts.year),
        *(tick[flag] for flag in (facts.exact, facts.mixed_ranks, facts.personal)),
        f"{c.upload_bytes / 1e6:.2f}",
        f"{c.download_bytes / 1e6:.2f}",
        facts.upload,
        facts.download,
        facts.server,
    ]
    return f"| {' | '.join(cells)} |"


def _make_up(ask: Train | Observe, setup: Setup, t: int, client: Client) -> Trained | Observed:
    """What training or looking at data could have answered."""
    draw = torch.Generator().manual_seed(seeds.derive(0, "made up", t, client.id))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    if isinstance(ask, Observe):
        if isinstance(ask.statistic, Features):
            return Observed({"features": noise(ask.statistic.count, HIDDEN)})
        k = ask.statistic.components
        return Observed(
            {
                "labels": torch.arange(CLASSES),
                "counts": torch.full((CLASSES,), 50),
                "weights": torch.full((CLASSES, k), 1 / k),
                "means": noise(CLASSES, k, HIDDEN),
                "variances": noise(CLASSES, k, HIDDEN).square(),
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
    print(table(), end="")
