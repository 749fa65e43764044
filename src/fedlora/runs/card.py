"""What stands beside an exported adapter or model, for programs (fedlora.json) and for people (README.md)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora import __version__, methods
from fedlora.config import ClientsConfig, Config
from fedlora.models.cut import Cut
from fedlora.names import is_local, short
from fedlora.runs.prepare import has_own_models
from fedlora.runs.roster import Roster
from fedlora.tasks.base import Card, Result
from fedlora.tasks.metrics import Metric


@dataclass(frozen=True)
class Facts:
    """What is known of an export.

    Attributes:
        roster: who took part, and what the run was scored by.
        card: what its task says of it.
        rows: of the rounds that it comes from; empty where there is none.
        client: whose model it is; None for everybody's.
        revision: the commit of its base on the Hub, where that is known.
        ranks: of an adapter's modules; empty of a whole model.
        cut: what was lost where the adapter was cut to a rank.
    """

    config: Config
    roster: Roster
    card: Card
    result: Result
    rows: Sequence[Mapping[str, Any]]
    client: int | None = None
    revision: str | None = None
    ranks: Sequence[int] = ()
    cut: Cut | None = None

    @property
    def row(self) -> Mapping[str, Any]:
        """Metrics of the last round; empty where there is none."""
        return self.rows[-1] if self.rows else {}

    def total(self, key: str) -> int:
        """Of a number that each round has."""
        return sum(row[key] for row in self.rows)


def as_json(facts: Facts) -> str:
    """What its task says, where it comes from and what it scored, as JSON."""
    config, (_, *others) = facts.config, facts.roster.metrics
    found = {
        "base_model": facts.result.pretrained.source,
        "base_model_revision": facts.revision,
        "task": config.task.name,
        **facts.card.fields,
        "method": config.method.name,
        "data": config.data.title,
        "clients": len(facts.roster.clients),
        "held_out": len(facts.roster.held_out),
        "sample": config.clients.sample,
        "client_ranks": [client.rank for client in facts.roster.clients],
        **(_came_of(facts) if facts.rows else {}),
        **{metric.name: score for metric in others if (score := _score(facts, metric)) is not None},
        **({} if facts.cut is None else {"cut": asdict(facts.cut)}),
        "client": facts.client,
        "seed": config.seed,
        "fedlora": __version__,
    }
    return json.dumps(found, indent=1) + "\n"


def _came_of(facts: Facts) -> dict[str, Any]:
    """What the rounds say that an export comes from."""
    sent = {f"{way}load_bytes": facts.total(f"{way}load_bytes") for way in ("up", "down")}
    first = facts.roster.metrics[0]
    return {"rounds": facts.row["round"], **sent, first.name: _score(facts, first)}


def model_card(facts: Facts) -> str:
    """A model card in Hugging Face's format. Its metadata name the base where that is on the Hub: there, another name would be
    refused, or be somebody else's model."""
    config, source = facts.config, facts.result.pretrained.source
    base, merged, task = short(source), facts.result.merged, facts.card
    what = "model" if merged else "LoRA adapter"
    title = methods.find(config.method.name).FACTS.title
    metadata = ["---", *([f"base_model: {base}"] if source and not is_local(source) else []), f"pipeline_tag: {task.pipeline}"]
    metadata += [f"library_name: {'transformers' if merged else 'peft'}", "tags:", "- federated-learning", "- lora", "---"]
    on = f" on `{base}`" if base else ""
    return "\n".join(
        [
            *metadata,
            f"# {config.data.title}: {what} by {title}",
            f"{task.what}{on}, trained by federated learning with fedlora {__version__}: the data of the clients never left them.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in _table(facts)),
            "",
            "```python",
            *task.code,
            "```",
            "",
            task.after,
            "",
        ]
    )


def _table(facts: Facts) -> Iterator[tuple[str, str]]:
    """The rows of the card, name and value."""
    config, roster, metrics = facts.config, facts.roster, facts.roster.metrics
    whose = "everybody's model" if facts.client is None else f"the model of client {facts.client} alone"
    if facts.client is None and has_own_models(config):
        whose = "what its clients share: each ended with a model of its own, and this one was not scored"
    yield "method", f"{methods.find(config.method.name).FACTS.title} (`{config.method.name}`)"
    yield "whose", whose
    if facts.revision:
        yield "base model's revision", f"`{facts.revision}`"
    yield "data", config.data.title
    yield "clients", _clients(len(roster.clients), len(roster.held_out), config.clients)
    if facts.rows:
        yield "rounds", str(facts.row["round"])
    if config.model.quantise:
        yield "base in training", f"in {config.model.quantise}, by bitsandbytes"
    yield "ranks of the clients", _span([client.rank for client in roster.clients])
    if facts.ranks:
        yield "rank of this adapter", _span(facts.ranks) + (", by module" if len(set(facts.ranks)) > 1 else "")
    if facts.cut is not None:
        yield "what was cut", f"{facts.cut}; the scores are from before the cut"
    if facts.rows:
        up, down = (f"{facts.total(f'{way}load_bytes') / 1e6:,.1f} MB" for way in ("up", "down"))
        yield "sent, by all clients in all rounds", f"{up} up, {down} down"
    for metric in metrics if facts.rows else ():
        score = _score(facts, metric)
        if metric is metrics[0]:
            yield metric.title, "not scored" if score is None else f"{metric.text(score)} {facts.card.of}"
        elif score is not None:
            yield metric.title, metric.text(score)
    yield from facts.card.facts


def _clients(count: int, held_out: int, config: ClientsConfig) -> str:
    share = config.sample
    part = f"{share} of them" if isinstance(share, int) else "all" if share >= 1.0 else f"{100 * share:g} % of them"
    beside = f"; {held_out} more held out, to score the model for somebody new" if held_out else ""
    return f"{count}, {part} in a round{beside}"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _score(facts: Facts, metric: Metric) -> float | None:
    """On the test part in the last round: of a client's model, on its own part. Where clients end with models of their own,
    everybody's was not scored."""
    if facts.client is None:
        return None if has_own_models(facts.config) else facts.row.get(metric.name)
    found: float | None = facts.row.get(f"client_{metric.name}", {}).get(str(facts.client))
    return found
