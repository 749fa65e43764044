"""What stands beside an exported adapter or model, for programs (fedlora.json) and for people (README.md)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora import __version__, methods
from fedlora.config import Config
from fedlora.names import short
from fedlora.runs.prepare import has_own_models
from fedlora.tasks.base import Card, Result
from fedlora.tasks.metrics import Metric


@dataclass(frozen=True)
class Facts:
    """What is known of an export.

    Attributes:
        metric: what it was scored by.
        card: what its task says of it.
        row: metrics of its last round; None where there are none.
        client: whose model it is; None for everybody's.
    """

    config: Config
    metric: Metric
    card: Card
    result: Result
    row: Mapping[str, Any] | None
    client: int | None


def as_json(facts: Facts) -> str:
    """What its task says, where it comes from and what it scored, as JSON."""
    config, row = facts.config, facts.row or {}
    found = {
        "base_model": facts.result.pretrained.source,
        "task": config.task.name,
        **facts.card.fields,
        "method": config.method.name,
        "data": config.data.title,
        "rounds": row.get("round"),
        facts.metric.name: _score(facts),
        "client": facts.client,
        "seed": config.seed,
        "fedlora": __version__,
    }
    return json.dumps(found, indent=1) + "\n"


def model_card(facts: Facts) -> str:
    """A model card in Hugging Face's format."""
    config, row = facts.config, facts.row
    base, merged, task = short(facts.result.pretrained.source), facts.result.merged, facts.card
    what = "model" if merged else "LoRA adapter"
    whose = "everybody's model" if facts.client is None else f"the model of client {facts.client} alone"
    if facts.client is None and has_own_models(config):
        whose = "what its clients share: each ended with a model of its own, and this one was not scored"
    title = methods.find(config.method.name).FACTS.title
    found, rounds = _score(facts), "-" if row is None else row["round"]
    score = "not scored" if found is None else f"{facts.metric.text(found)} {task.of}"
    metadata = ["---", f"base_model: {base}", f"pipeline_tag: {task.pipeline}"]
    metadata += [f"library_name: {'transformers' if merged else 'peft'}", "tags:", "- federated-learning", "- lora", "---"]
    return "\n".join(
        [
            *metadata,
            f"# {config.data.title}: {what} by {title}",
            f"{task.what} on `{base}`, trained by federated learning with fedlora {__version__}: the data of the clients never "
            "left them.",
            "",
            "| | |",
            "|---|---|",
            f"| method | {title} (`{config.method.name}`) |",
            f"| whose | {whose} |",
            f"| data | {config.data.title} |",
            f"| rounds | {rounds} |",
            *([f"| base in training | in {config.model.quantise}, by bitsandbytes |"] if config.model.quantise else []),
            f"| {facts.metric.title} | {score} |",
            *(f"| {name} | {value} |" for name, value in task.facts),
            "",
            "```python",
            *task.code,
            "```",
            "",
            task.after,
            "",
        ]
    )


def _score(facts: Facts) -> float | None:
    """On the test part in the last round: of a client's model, on its own part. Where clients end with models of their own,
    everybody's was not scored."""
    row = facts.row or {}
    if facts.client is None:
        return None if has_own_models(facts.config) else row.get("score")
    found: float | None = row.get(f"client_{facts.metric.name}", {}).get(str(facts.client))
    return found
