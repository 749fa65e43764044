"""Scores by asking: of the one model on the server's data, or, where clients end with models of their own, of each client's on its
own part of them. What comes back is sums, added in order of the clients' ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlora import wire
from fedlora.gather.exchange import answers
from fedlora.messages import SERVER, TEST, VALIDATION, Behind, Forgot, ScoreAsk, Scored, Transport
from fedlora.server.loop import Federation, Server
from fedlora.tasks.metrics import Scoring, Sums, fit, total
from fedlora.types import Client

SUMMED = (torch.int64, torch.float64)
SERVER_CLIENT = Client(SERVER, 0, 0)  # plays the server's own data


@dataclass(frozen=True)
class Panel:
    """What models are scored on.

    Attributes:
        clients: part -> who is scored on it: SERVER_CLIENT alone, or clients, where they have their own parts.
        own: whether each of these by its own model.
        transport: to where those clients are.
        scoring: how.
    """

    clients: Mapping[str, Sequence[Client]]
    own: bool
    transport: Transport
    scoring: Scoring


@dataclass(frozen=True)
class Scores:
    """Client -> the sums over its examples, and what crossed the wire for them; `lost` are those that gave none."""

    scoring: Scoring
    sums: Mapping[int, Sums]
    bytes: int
    lost: tuple[int, ...] = ()

    @property
    def total(self) -> Sums:
        """The sums over all clients, in order of their ids."""
        return total(self.scoring, (self.sums[id] for id in sorted(self.sums)))

    @property
    def by_client(self) -> dict[int, float]:
        """The first metric of each client."""
        first = self.scoring.metrics[0].name
        return {id: self.scoring.scores(self.sums[id])[first] for id in sorted(self.sums)}


def evaluate(federation: Federation, server: Server, panel: Panel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a row says of the server's model, or of its clients' own, on the test part, and on the validation part where there is
    one; and what the test part's sums say in detail."""
    asked = {
        part: own_asks(federation, server, part, who) if panel.own else common_asks(federation, server, part, who)
        for part, who in panel.clients.items()
    }
    found = {part: score(federation, server, asks, panel) for part, asks in asked.items()}
    scoring, test, sums = panel.scoring, found[TEST], found[TEST].total
    row: dict[str, Any] = {
        **all_scores(scoring, sums),
        "examples_scored": scoring.count(sums),
        "clients_scored": sum(id != SERVER for id in test.sums),
        "evaluate_bytes": sum(each.bytes for each in found.values()),
    }
    if scoring.undecided(sums):
        row["undecided"] = scoring.undecided(sums)
    first = scoring.metrics[0].name
    if panel.own:
        row[f"client_{first}"] = {str(id): score for id, score in test.by_client.items()}
        never = [id for id in test.sums if id not in server.accepted]
        if never:
            row["clients_untrained"] = len(never)
    if test.lost:
        row["clients_not_scored"] = list(test.lost)
    own = scoring.by_domain(sums)
    if own:
        row[f"domain_{first}"] = own
    if VALIDATION in found:
        row |= {f"validation_{name}": score for name, score in scoring.scores(found[VALIDATION].total).items()}
    return row, {name: torch.from_numpy(x) for name, x in scoring.arrays(sums).items()}


def all_scores(scoring: Scoring, sums: Sums) -> dict[str, Any]:
    """Every metric of these sums, which is the first and what it is, and that of the constant answer."""
    first, found = scoring.metrics[0], scoring.scores(sums)
    named: dict[str, Any] = {"metric": first.name, "score": found[first.name]}
    return found | named | ({first.baseline: scoring.baseline(sums)} if first.baseline else {})


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

    found: dict[int, Sums] = {}
    size = 0
    for ask, body in answers(asks, panel.transport, federation.envelopes, again):
        if not isinstance(body, Scored):
            continue
        sums = _arrays(body.sums)
        if fit(panel.scoring, sums):
            found[ask.client.id] = sums
            if ask.client.id != SERVER:
                size += wire.measure([ask.model, ask.down, ask.head]).total + wire.measure(body).total
    return Scores(panel.scoring, found, size, tuple(sorted({ask.client.id for ask in asks} - set(found))))


def _arrays(sums: Any) -> Any:
    """Received sums as arrays; what is no mapping of tensors is left for the check to refuse."""
    if not isinstance(sums, Mapping) or not all(isinstance(x, Tensor) and x.dtype in SUMMED for x in sums.values()):
        return None
    return {name: x.numpy() for name, x in sums.items()}
