"""Who takes part in a run, and with which ranks."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import RANK_SHARES, ClientsConfig, RankPlan
from fedlora.data.dataset import Dataset, Domain
from fedlora.data.domains import domain_counts
from fedlora.data.partition import Parts
from fedlora.errors import BadInput
from fedlora.types import Client


@dataclass(frozen=True)
class Roster:
    """Who takes part: written to federation.json, so that a finished run can be read without its data.

    Attributes:
        names: of the clients, by id.
        num_test: test examples of each client.
        domains: of a run of several.
        modules: the adapted layers, in the order of arrays that have a row for each. No matter of who takes part, so two rosters
            may differ in it.
        rows: tokens that fill a step of training, which decides who trains together; a run that is resumed keeps it.
        max_length: tokens at which texts are cut.
        padding: on which side the model takes padding, "right" or "left"; "none" where it is changed by any.
        data: digest of the texts, labels and owners; None where the folder does not say.
    """

    label_names: tuple[str, ...]
    clients: tuple[Client, ...]
    names: tuple[str, ...]
    num_test: tuple[int, ...]
    domains: tuple[Domain, ...] = ()
    modules: tuple[str, ...] = field(default=(), compare=False)
    rows: int | None = field(default=None, compare=False)
    max_length: int | None = field(default=None, compare=False)
    padding: str = field(default="right", compare=False)
    data: str | None = field(default=None, compare=False)

    def to_json(self) -> str:
        rows = [
            {"id": c.id, "name": name, "rank": c.rank, "num_examples": c.num_examples, "num_test": n}
            | ({"domains": dict(c.domains)} if c.domains else {})
            for c, name, n in zip(self.clients, self.names, self.num_test, strict=True)
        ]
        domains = {"domains": [asdict(domain) for domain in self.domains]} if self.domains else {}
        model = {"modules": self.modules, "rows": self.rows, "max_length": self.max_length, "padding": self.padding}
        model |= {"data": self.data}
        return json.dumps({"label_names": self.label_names, **domains, **model, "clients": rows}, indent=1)


def read_roster(path: Path) -> Roster:
    """The roster of a run folder. BadInput when the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
        rows = found["clients"]
        return Roster(
            tuple(found["label_names"]),
            tuple(Client(r["id"], r["rank"], r["num_examples"], _domains(r, {})) for r in rows),
            tuple(r["name"] for r in rows),
            tuple(r["num_test"] for r in rows),
            tuple(Domain(t["name"], t["first"], t["count"]) for t in _domains(found, ())),
            tuple(found.get("modules", ())),
            found.get("rows"),
            found.get("max_length"),
            found.get("padding", "right"),
            found.get("data"),
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
            raise BadInput(f"clients.rank lists {len(rank)} ranks for {count} clients")
        return list(rank)
    if rank is RankPlan.TIERS:
        return [2 ** (k % 5 + 1) for k in range(count)]
    edges = np.cumsum(RANK_SHARES[rank]) * count / 30
    return [2 ** (1 + int(np.searchsorted(edges, k + 0.5))) for k in range(count)]


def make_clients(config: ClientsConfig, dataset: Dataset, parts: Parts) -> tuple[Client, ...]:
    """The clients that the data were dealt to. BadInput where `config` speaks of more, or of fewer."""
    if isinstance(config.sample, int) and config.sample > len(parts.train):
        raise BadInput(
            f"clients.sample = {config.sample}: the run has {len(parts.train)} clients; a share up to 1.0 is possible, too"
        )
    dealt = zip(client_ranks(config, len(parts.train)), parts.train, strict=True)
    return tuple(Client(i, rank, len(where), domain_counts(dataset, where)) for i, (rank, where) in enumerate(dealt))
