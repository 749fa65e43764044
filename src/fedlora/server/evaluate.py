"""Scores by asking: of the one model on the server's data, or, where clients end with models of their own, of each client's on its
own part of them. What comes back is sums, added in order of the clients' ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlora import wire
from fedlora.gather.exchange import answers
from fedlora.messages import SERVER, TEST, VALIDATION, Behind, Forgot, ScoreAsk, Scored, Transport
from fedlora.server.loop import Federation, Server
from fedlora.tasks import metrics
from fedlora.types import Client, Tensors

SERVER_CLIENT = Client(SERVER, 0, 0)  # plays the server's own data


@dataclass(frozen=True)
class Panel:
    """What models are scored on.

    Attributes:
        clients: part -> who is scored on it: SERVER_CLIENT alone, or, with `own`, clients by their own models.
        transport: to where those clients are.
        classes: how many there are.
        domains: domain -> its classes, in a run of several.
    """

    clients: Mapping[str, Sequence[Client]]
    own: bool
    transport: Transport
    classes: int
    domains: Mapping[str, slice] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Client -> the sums over its examples, and what crossed the wire for them; `lost` are those that gave none."""

    sums: Mapping[int, Tensors]
    bytes: int
    lost: tuple[int, ...] = ()

    def total(self, classes: int) -> dict[str, Any]:
        """The sums over all clients, as numpy arrays."""
        added = {name: torch.zeros(shape, dtype=torch.int64).numpy() for name, shape in _shapes(classes).items()}
        for id in sorted(self.sums):
            for name, x in self.sums[id].items():
                added[name] = added[name] + x.numpy()
        return added

    def accuracy(self, id: int) -> float:
        """Of one client."""
        return metrics.accuracy({name: x.numpy() for name, x in self.sums[id].items()})


def evaluate(federation: Federation, server: Server, panel: Panel) -> tuple[dict[str, Any], Tensor]:
    """What a row says of the server's model, or of its clients' own, on the test part, and on the validation part where there is
    one; and how often each class (row) was taken for each (column) on the test part, (C, C)."""
    asked = {
        part: own_asks(federation, server, part, who) if panel.own else common_asks(federation, server, part, who)
        for part, who in panel.clients.items()
    }
    found = {part: score(federation, server, asks, panel) for part, asks in asked.items()}
    test, sums = found[TEST], found[TEST].total(panel.classes)
    row: dict[str, Any] = {
        **metrics.scores(sums),
        "commonest_accuracy": metrics.commonest_accuracy(sums),
        "examples_scored": metrics.count(sums),
        "clients_scored": len(test.sums) if panel.own else 0,
        "evaluate_bytes": sum(each.bytes for each in found.values()),
    }
    if metrics.undecided(sums):
        row["undecided"] = metrics.undecided(sums)
    if panel.own:
        row["client_accuracy"] = {str(id): test.accuracy(id) for id in sorted(test.sums)}
        never = [id for id in test.sums if id not in server.accepted]
        if never:
            row["clients_untrained"] = len(never)
    if test.lost:
        row["clients_not_scored"] = list(test.lost)
    if panel.domains:
        own = {name: metrics.accuracy(sums, classes) for name, classes in panel.domains.items()}
        row["domain_accuracy"] = {name: share for name, share in own.items() if share == share}
    if VALIDATION in found:
        held = found[VALIDATION].total(panel.classes)
        row |= {f"validation_{name}": share for name, share in metrics.scores(held).items()}
    return row, torch.from_numpy(sums["confusion"][:, :-1].copy())


def common_asks(federation: Federation, server: Server, part: str, clients: Sequence[Client]) -> list[ScoreAsk]:
    """The deployed model, on each client's examples."""
    model = federation.method.deploy(server.state)
    return [ScoreAsk(server.round + 1, client, part, model, head=server.head) for client in clients]


def own_asks(federation: Federation, server: Server, part: str, clients: Sequence[Client]) -> list[ScoreAsk]:
    """Each client's own model; the deployed one of a client that has never taken part, and where only heads are personal."""
    method, t = federation.method, server.round + 1
    asks = common_asks(federation, server, part, clients)
    for i, (ask, client) in enumerate(zip(asks, clients, strict=True)):
        if client.id in server.accepted:
            asks[i] = replace(ask, held=server.accepted[client.id])
            if method.FACTS.personal:
                asks[i] = replace(asks[i], model=None, down=method.send(server.state, client, t, since=0))
    return asks


def score(federation: Federation, server: Server, asks: Sequence[ScoreAsk], panel: Panel) -> Scores:
    """What the clients answer. Who forgot what it kept is scored as one that has never taken part."""

    def again(ask: ScoreAsk, why: Behind | Forgot) -> ScoreAsk:
        return replace(ask, model=federation.method.deploy(server.state), down=None, held=0)

    found: dict[int, Tensors] = {}
    size = 0
    for ask, body in answers(asks, panel.transport, federation.envelopes, again):
        if isinstance(body, Scored) and _fit(body.sums, panel.classes):
            found[ask.client.id] = body.sums
            if ask.client.id != SERVER:
                size += wire.measure([ask.model, ask.down, ask.head]).total + wire.measure(body).total
    return Scores(found, size, tuple(sorted({ask.client.id for ask in asks} - set(found))))


def _shapes(classes: int) -> dict[str, tuple[int, ...]]:
    return {"confusion": (classes, classes + 1), "commonest": (1,)}


def _fit(sums: Any, classes: int) -> bool:
    """Whether sums are those of so many classes."""
    if not isinstance(sums, Mapping) or set(sums) != set(_shapes(classes)):
        return False
    return all(
        isinstance(x, Tensor) and x.dtype == torch.int64 and tuple(x.shape) == _shapes(classes)[name] and bool((x >= 0).all())
        for name, x in sums.items()
    )
