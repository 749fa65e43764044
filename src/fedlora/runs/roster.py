"""Who takes part in a run, and with which ranks."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import RANK_SHARES, ClientsConfig, RankPlan
from fedlora.data.dataset import Dataset, Domain, Schema
from fedlora.data.domains import domain_counts
from fedlora.data.partition import Parts
from fedlora.errors import BadInput, some
from fedlora.summary import metrics_of
from fedlora.tasks.metrics import CLASSIFICATION, Metric
from fedlora.types import Client


@dataclass(frozen=True)
class HeldOut:
    """A client that never trains, and how many examples it has."""

    name: str
    num_examples: int
    num_test: int


@dataclass(frozen=True)
class Roster:
    """Who takes part: written to federation.json, so that a finished run can be read without its data.

    Attributes:
        names: of the clients, by id.
        num_test: test examples of each client.
        metrics: what the run is scored by. No matter of who takes part, as what comes next.
        modules: the adapted layers, in the order of arrays that have a row for each. No matter of who takes part, so two rosters
            may differ in it.
        rows: tokens that fill a step of training, which decides who trains together; a run that is resumed keeps it.
        max_length: tokens at which texts are cut.
        padding: on which side the model takes padding, "right" or "left"; "none" where it is changed by any.
        data: digest of the texts, labels and owners; None where the folder does not say.
        held_out: the clients that never train; they have no number among `clients`.
    """

    schema: Schema
    clients: tuple[Client, ...]
    names: tuple[str, ...]
    num_test: tuple[int, ...]
    metrics: tuple[Metric, ...] = field(default=CLASSIFICATION, compare=False)
    modules: tuple[str, ...] = field(default=(), compare=False)
    rows: int | None = field(default=None, compare=False)
    max_length: int | None = field(default=None, compare=False)
    padding: str = field(default="right", compare=False)
    data: str | None = field(default=None, compare=False)
    held_out: tuple[HeldOut, ...] = ()

    def to_json(self) -> str:
        rows = [
            {"id": c.id, "name": name, "rank": c.rank, "num_examples": c.num_examples, "num_test": n}
            | ({"domains": dict(c.domains)} if c.domains else {})
            for c, name, n in zip(self.clients, self.names, self.num_test, strict=True)
        ]
        schema = self.schema
        what: dict[str, Any] = {"label_names": schema.label_names}
        what |= {"domains": [asdict(domain) for domain in schema.domains]} if schema.domains else {}
        what |= {"shape": schema.shape} if schema.shape else {}
        what |= {"scales": schema.scales} if schema.scales else {}
        what |= {"prompts": schema.prompts} if schema.prompts else {}
        what["metrics"] = [metric.as_json() for metric in self.metrics]
        model = {"modules": self.modules, "rows": self.rows, "max_length": self.max_length, "padding": self.padding}
        model |= {"data": self.data}
        held_out = {"held_out": [asdict(each) for each in self.held_out]} if self.held_out else {}
        return json.dumps({**what, **model, "clients": rows, **held_out}, indent=1)


def read_roster(path: Path) -> Roster:
    """The roster of a run folder. BadInput when the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
        rows = found["clients"]
        return Roster(
            Schema(
                tuple(found["label_names"]),
                tuple(Domain(t["name"], t["first"], t["count"]) for t in _domains(found, ())),
                tuple(found.get("shape", ())),
                tuple((mean, spread) for mean, spread in found.get("scales", ())),
                tuple((name, column) for name, column in found.get("prompts", ())),
            ),
            tuple(Client(r["id"], r["rank"], r["num_examples"], _domains(r, {})) for r in rows),
            tuple(r["name"] for r in rows),
            tuple(r["num_test"] for r in rows),
            metrics_of(found),
            tuple(found.get("modules", ())),
            found.get("rows"),
            found.get("max_length"),
            found.get("padding", "right"),
            found.get("data"),
            tuple(HeldOut(each["name"], each["num_examples"], each["num_test"]) for each in found.get("held_out", ())),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: missing or damaged, so this is no run folder ({error})") from error


def _domains(table: Mapping[str, Any], default: Any) -> Any:
    """What a table of the file says of domains, which earlier versions called tasks."""
    return table.get("domains", table.get("tasks", default))


def client_ranks(config: ClientsConfig, count: int) -> list[int]:
    """The rank of every client: one number for all, a list by client, or a named plan."""
    rank = config.rank
    if isinstance(rank, int):
        return [rank] * count
    if isinstance(rank, list):
        if len(rank) != count:
            that = " that train" if config.held_out else ""
            raise BadInput(f"clients.rank lists {len(rank)} ranks for {count} clients{that}")
        return list(rank)
    if rank is RankPlan.TIERS:
        return [2 ** (k % 5 + 1) for k in range(count)]
    edges = np.cumsum(RANK_SHARES[rank]) * count / 30
    return [2 ** (1 + int(np.searchsorted(edges, k + 0.5))) for k in range(count)]


def make_clients(config: ClientsConfig, dataset: Dataset, parts: Parts) -> tuple[Client, ...]:
    """The clients that train, of those that the data were dealt to. BadInput where `config` speaks of more, or of fewer."""
    count = len(parts.train) - parts.held_out
    if isinstance(config.sample, int) and config.sample > count:
        that = " that train" if parts.held_out else ""
        raise BadInput(f"clients.sample = {config.sample}: the run has {count} clients{that}; a share up to 1.0 is possible, too")
    dealt = zip(client_ranks(config, count), parts.train, strict=False)
    return tuple(Client(i, rank, len(where), domain_counts(dataset, where)) for i, (rank, where) in enumerate(dealt))


def make_held_out(config: ClientsConfig, parts: Parts) -> tuple[HeldOut, ...]:
    """The clients that never train. BadInput where they have nothing to be scored on."""
    first = len(parts.train) - parts.held_out
    found = tuple(
        HeldOut(name, len(train), len(test))
        for name, train, test in zip(parts.names[first:], parts.train[first:], parts.test[first:], strict=True)
    )
    if found and not any(each.num_test for each in found):
        raise BadInput(
            f"clients.held_out = {config.held_out}: none that is held out has a test example "
            f"({some([each.name for each in found])}); hold out more clients, or take another seed"
        )
    return found
