"""What edge servers would save where a million clients reply: their replies folded on the way. The page docs/hierarchy.md, and its
picture.

    python -m fedlora.runs.hierarchy docs/hierarchy.md     a minute

What a reply weighs, and the seconds in which this machine decodes it and adds it to a sum, are measured on real messages of
RoBERTa-base's shapes at rank 8, whose training is made up; so is what a folded message weighs. The rest is arithmetic: of E edge
servers each takes its share of the replies one after the other, all at the same time, and the root then takes E folded messages.
"""

import math
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora import methods, wire
from fedlora.algebra.products import ProductMean
from fedlora.disk import write_whole
from fedlora.gather.lifted import lifted_mean
from fedlora.report.looks import QUIET, look
from fedlora.report.picture import Panel, Picture, save
from fedlora.runs.costs import RANK, make_up, played, roberta_setup
from fedlora.types import Client, Setup, declared

CLIENTS = 1_000_000  # that reply in a round
LINK = 1.25e9  # bytes a second into a server: 10 Gbit/s
LINEAR, STACK = ("fedit", "lora-a2", "ffa-lora"), "flora"
MANY, STACKED = 8, 40  # replies that are timed; how often they are stacked
EDGES = [round(10 ** (i / 4)) for i in range(25)]  # 1 to a million


@dataclass(frozen=True)
class Cost:
    """Of one method, measured.

    Attributes:
        reply: bytes of a client's.
        folded: of how many replies -> bytes of the message that an edge server makes of them.
        seconds: to decode a reply and add it to a sum; `again`, the same of a folded message.
        error: the largest difference between folding over edge servers and at once, beside the largest entry.
    """

    reply: int
    folded: Callable[[int], int]
    seconds: float
    again: float
    error: float


@dataclass(frozen=True)
class Round:
    """Of a number of edge servers: bytes that reach the root, and seconds until it has all."""

    edges: int
    root: float
    seconds: float


def flat(cost: Cost, clients: int = CLIENTS) -> Round:
    """All replies go to one server."""
    return Round(0, clients * cost.reply, clients * (cost.reply / LINK + cost.seconds))


def tree(cost: Cost, edges: int, clients: int = CLIENTS) -> Round:
    """They go to edge servers, and what these make of them to the root."""
    each = math.ceil(clients / edges)
    message = cost.folded(each)
    below = each * (cost.reply / LINK + cost.seconds)
    return Round(edges, edges * message, below + edges * (message / LINK + cost.again))


def fold_linear(weighted: Sequence[tuple[float, Any]], edges: int) -> Any:
    """The mean of Ups of a method with `Facts.linear`, first by edge server: each sends its own mean and the sum of its weights."""
    parts = [weighted[i::edges] for i in range(edges)]
    return lifted_mean((sum(weight for weight, _ in part), lifted_mean(part)) for part in parts if part)


def fold_stacks(terms: Sequence[tuple[float, float, Tensor, Tensor]], edges: int) -> Tensor:
    """sum_k w_k s_k B_k A_k / sum_k w_k of one module, (d_out, d_in), first by edge server: each sends its own mean, a product or
    the matrix where that is smaller, and the sum of its weights.

    Args:
        terms: w_k, s_k, B_k of (d_out, r_k), A_k of (r_k, d_in).
    """
    total = 0.0
    found: list[Tensor] = []
    for part in filter(None, (terms[i::edges] for i in range(edges))):
        mean = ProductMean()
        for w, s, B, A in part:
            mean.add(w, B, A, s)
        message = mean.value()
        found.append(mean.total * (message[0] @ message[1] if isinstance(message, tuple) else message))
        total += mean.total
    return torch.stack(found).sum(0) / total


@dataclass(frozen=True)
class Replies:
    """Some clients' first replies: their Ups, as they cross the wire, and what each counts."""

    setup: Setup
    ups: Sequence[Any]
    sent: Sequence[bytes]
    classes: Sequence[type[Any]]
    weights: Sequence[float] = tuple(1000.0 + 100 * i for i in range(MANY))

    def weighted(self, data: Iterable[bytes] | None = None) -> list[tuple[float, Any]]:
        """Weights and Ups; of these messages, where there are some."""
        ups = self.ups if data is None else [wire.decode(each, self.classes) for each in data]
        return list(zip(self.weights, ups, strict=True))


def replies(name: str) -> Replies:
    """Of MANY clients of a method, their training made up."""
    setup, method = roberta_setup(), methods.make(name, {})
    state = method.init(setup)

    def up(client: Client) -> Any:
        local = method.local(method.send(state, client, 1), method.hold(setup, client), client, 1)
        return played(local, lambda ask: make_up(ask, setup, 1, client))[0]

    ups = [up(client) for client in setup.clients[:MANY]]
    return Replies(setup, ups, [wire.encode(each) for each in ups], wire.message_classes(method))


def of_means(found: Replies) -> Cost:
    """What a method costs on this machine whose replies an edge server folds into their mean."""
    mean = lifted_mean(found.weighted())
    folded = wire.encode(mean)
    seconds, again = (_timed(partial(_decoded_mean, found, data)) / MANY for data in (found.sent, [folded] * MANY))
    error = _distance(fold_linear(found.weighted(), 3), mean)
    return Cost(len(found.sent[0]), lambda n: len(folded), seconds, again, error)


def of_stacks(found: Replies) -> Cost:
    """The same of one whose replies it stacks, and forms where there are many."""
    shapes = found.setup.shapes
    largest, numbers = max(shapes, key=lambda m: math.prod(shapes[m])), sum(map(math.prod, shapes.values()))
    terms = [(w, 2.0, up.B[largest], up.A[largest]) for w, up in found.weighted()]

    def stacked() -> object:
        mean = ProductMean()
        for _ in range(STACKED):  # beyond where a stack becomes a matrix
            for w, s, B, A in terms:
                mean.add(w, B, A, s)
        return mean.value()

    share = math.prod(shapes[largest]) / numbers  # of a reply's work
    seconds = _timed(lambda: found.weighted(found.sent)) / MANY + _timed(stacked) / (MANY * STACKED) / share
    matrix, total = torch.randn(numbers), torch.zeros(numbers, dtype=torch.float64)
    again = _timed(lambda: total.add_(matrix))
    exact = [(w, s, B.double(), A.double()) for w, s, B, A in terms]
    whole = sum(w * s * B @ A for w, s, B, A in exact) / sum(found.weights)
    error = float((fold_stacks(exact, 3) - whole).abs().max() / whole.abs().max())
    reply = len(found.sent[0])
    return Cost(reply, lambda n: min(n * reply, 4 * numbers), seconds, again, error)


def best(cost: Cost) -> Round:
    """With as many edge servers as take the least time."""
    return min((tree(cost, edges) for edges in EDGES), key=lambda each: each.seconds)


def page(costs: dict[str, Cost]) -> str:
    """The markdown page."""
    rows = []
    for name, cost in costs.items():
        one, least = flat(cost), best(cost)
        cells = [
            f"`{name}`",
            f"{cost.reply / 1e6:.2f}",
            f"{cost.folded(1000) / 1e6:.2f}",
            f"{1e3 * cost.seconds:.1f}",
            f"{one.root / 1e12:.2f}",
            f"{one.seconds / 3600:.1f}",
            f"{least.edges:,}",
            f"{least.root / 1e9:.2f}",
            f"{least.seconds:.0f}",
            f"{cost.error:.0e}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return HEADING + "\n".join(rows) + "\n" + ENDING


HEADING = f"""# A million clients: folding replies on the way

Made by `python -m fedlora.runs.hierarchy docs/hierarchy.md`; do not edit. fedlora has one server: this page says what servers at
the edge, each of which takes the replies of some clients and sends one message on, would save, and for which methods they may.

**Which methods.** Those whose server makes of the replies what it makes of their mean (`Facts.linear`, by method and round; a law
test holds every method to it): an edge server sends the mean of its replies and the sum of their weights, as large as one reply
with all its entries. Where the server sums products (FLoRA, FLoRIST, FlexLoRA, FedEx-LoRA's residual) an edge server sends the
stack of its clients' factors, or their matrix once that is smaller. Both are exact: weighted means of weighted means. Not so RBLA,
whose mean of a rank is over those that have it: its weights would have to travel by rank. Methods that look at replies one by one
(FedLEASE's and FL-TAC's clusters) cannot be folded.

**The numbers.** All clients reply in one round. A server takes its replies one after the other over 10 Gbit/s; what a reply weighs,
and the milliseconds in which one machine of two cores decodes it and adds it up, are measured (RoBERTa-base's shapes, rank {RANK}).
Edge servers work at the same time; the time is theirs and then the root's. Training and the clients' own links are not in it.

![Bytes at the root and seconds of a round against the number of edge servers](images/hierarchy.png)

| method | MB a reply | MB a folded message, 1,000 replies | ms a reply | TB to one server | hours | best number of edge servers \
| GB to the root | seconds | folded, beside at once |
|{"---|" * 10}
""".replace("\\\n", "")
ENDING = """
With N clients and equal messages the best number of edge servers is about the square root of N: then root and edge have as much to
do. LoRA-A²'s reply holds the ranks that a client chose; folded, it holds all that anyone chose. A stack of 1,000 clients is larger
than the matrices of the modules, so these travel, and weigh the same whatever is behind them: fewer edge servers are better, and a
second tier would not make the message grow. The last column is the largest difference between the mean over three edge servers and
the mean at once, beside its largest entry (in float32; FLoRA's in float64).
"""


def picture(costs: dict[str, Cost]) -> Picture:
    """Bytes at the root and seconds of a round against the number of edge servers."""
    one = flat(costs["fedit"])
    finding = f"A thousand edge servers turn {one.seconds / 3600:.1f} hours of FedIT's million replies into "
    finding += f"{tree(costs['fedit'], 1000).seconds:.0f} seconds"

    def draw(axes: Any, of: Callable[[Round], float], name: str) -> None:
        for method, cost in costs.items():
            style = look(method)
            rounds = [tree(cost, edges) for edges in EDGES]
            axes.plot(EDGES, [of(each) for each in rounds], color=style.colour, linestyle=style.line, label=method)
            least = best(cost)
            axes.plot(least.edges, of(least), style.marker, color=style.colour, markerfacecolor=style.face)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([1, 100, 10_000, 1_000_000], ["1", "100", "10,000", "1,000,000"])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
        axes.set_xlabel("edge servers (1: all replies pass one)")
        axes.set_ylabel(name)
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=8, labelcolor=QUIET)

    panels = (
        Panel("Bytes that reach the root, GB", lambda axes: draw(axes, lambda each: each.root / 1e9, "GB")),
        Panel("Seconds of a round; marked: the least", lambda axes: draw(axes, lambda each: each.seconds, "seconds")),
    )
    return Picture("hierarchy", finding, "A million clients reply.", panels, (), columns=2)


def main() -> None:
    """Write the page that the command line names, and its picture."""
    arguments = ArgumentParser(prog="python -m fedlora.runs.hierarchy")
    arguments.add_argument("page", type=Path)
    place = arguments.parse_args().page
    costs = {name: of_means(replies(name)) for name in LINEAR} | {STACK: of_stacks(replies(STACK))}
    save(picture(costs), place.parent / "images")
    (place.parent / "images" / "hierarchy.svg").unlink()
    write_whole(place, page(costs).encode())


def _decoded_mean(found: Replies, sent: Sequence[bytes]) -> object:
    return lifted_mean(found.weighted(sent))


def _timed(work: Callable[[], object]) -> float:
    """The median of three, in seconds."""
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return sorted(found)[1]


def _distance(one: Any, other: Any) -> float:
    names = [name for name, (kind, _) in declared(one).items() if kind == "change"]
    pairs = [(getattr(one, name)[m], getattr(other, name)[m]) for name in names for m in getattr(one, name)]
    most = max(float(y.abs().max()) for _, y in pairs)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs) / most


if __name__ == "__main__":
    main()
