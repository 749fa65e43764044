"""What stands beside an exported adapter or model, for programs (fedlora.json) and for people (README.md)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora import __version__, methods
from fedlora.config import Config
from fedlora.models.heads import padding
from fedlora.models.load import Pretrained
from fedlora.names import short
from fedlora.runs.prepare import has_own_models


@dataclass(frozen=True)
class Facts:
    """What is known of an export.

    Attributes:
        limit: tokens at which texts were cut.
        padding: where texts may be padded: "right", "left", "none".
        merged: the whole model, not an adapter.
        row: metrics of its last round; None where there are none.
        client: whose model it is; None for everybody's.
    """

    config: Config
    label_names: tuple[str, ...]
    pretrained: Pretrained
    limit: int
    padding: str
    merged: bool
    row: Mapping[str, Any] | None
    client: int | None


def as_json(facts: Facts) -> str:
    """Labels, length, padding token, where it comes from and what it scored, as JSON."""
    config, row = facts.config, facts.row or {}
    found = {
        "base_model": facts.pretrained.source,
        "num_labels": len(facts.label_names),
        "id2label": {str(i): name for i, name in enumerate(facts.label_names)},
        "max_length": facts.limit,
        "pad_token_id": padding(facts.pretrained.model),
        "padding_side": facts.padding,
        "method": config.method.name,
        "data": config.data.title,
        "rounds": row.get("round"),
        "accuracy": _accuracy(facts),
        "client": facts.client,
        "seed": config.seed,
        "fedlora": __version__,
    }
    return json.dumps(found, indent=1) + "\n"


def model_card(facts: Facts) -> str:
    """A model card in Hugging Face's format."""
    config, row = facts.config, facts.row
    base = short(facts.pretrained.source)
    what = "model" if facts.merged else "LoRA adapter"
    whose = "everybody's model" if facts.client is None else f"the model of client {facts.client} alone"
    if facts.client is None and has_own_models(config):
        whose = "what its clients share: each ended with a model of its own, and this one was not scored"
    title = methods.find(config.method.name).FACTS.title
    accuracy, rounds = _accuracy(facts), "-" if row is None else row["round"]
    score = "not scored" if accuracy is None else f"{100 * accuracy:.1f} % of the test texts"
    metadata = ["---", f"base_model: {base}", "pipeline_tag: text-classification"]
    metadata += [f"library_name: {'transformers' if facts.merged else 'peft'}", "tags:", "- federated-learning", "- lora", "---"]
    return "\n".join(
        [
            *metadata,
            f"# {config.data.title}: {what} by {title}",
            f"A text classifier of {len(facts.label_names)} classes on `{base}`, trained by federated learning "
            f"with fedlora {__version__}: the data of the clients never left them.",
            "",
            "| | |",
            "|---|---|",
            f"| method | {title} (`{config.method.name}`) |",
            f"| whose | {whose} |",
            f"| data | {config.data.title} |",
            f"| rounds | {rounds} |",
            f"| accuracy | {score} |",
            f"| longest text | {facts.limit} tokens |",
            "",
            "```python",
            *_how_to_use(facts),
            "```",
            "",
            _on_padding(facts),
            "",
        ]
    )


def _accuracy(facts: Facts) -> float | None:
    """The share of test texts that were right in the last round: of a client's model, of its own ones. Where clients end with
    models of their own, everybody's was not scored."""
    row = facts.row or {}
    if facts.client is None and has_own_models(facts.config):
        return None
    found: float | None = row.get("accuracy") if facts.client is None else row.get("client_accuracy", {}).get(str(facts.client))
    return found


def _how_to_use(facts: Facts) -> list[str]:
    if facts.merged:
        imports, name, arguments = ["from transformers import AutoModelForSequenceClassification, AutoTokenizer"], "AutoModel", ""
    else:
        imports = ["from peft import AutoPeftModelForSequenceClassification", "from transformers import AutoTokenizer"]
        labels = dict(enumerate(facts.label_names))
        name, arguments = "AutoPeftModel", f", id2label={labels!r}, dtype='float32'"
    texts, padded = ('["a text", "another"]', ", padding=True") if facts.padding != "none" else ('["a text"]', "")
    return [
        *imports,
        'folder = "."  # this folder',
        f"model = {name}ForSequenceClassification.from_pretrained(folder{arguments}).eval()",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *([] if facts.merged else ["model.config.get_text_config().pad_token_id = tokenizer.pad_token_id"]),
        f'logits = model(**tokenizer({texts}, truncation=True{padded}, return_tensors="pt")).logits',
        "print([model.config.id2label[i] for i in logits.argmax(-1).tolist()])",
    ]


def _on_padding(facts: Facts) -> str:
    if facts.padding == "none":
        return "Padding: this model is changed by padding, so give it one text at a time."
    token, id = facts.pretrained.tokenizer.pad_token, padding(facts.pretrained.model)
    return (
        f"Padding: this folder's tokenizer pads with `{token}` (id {id}). A decoder's head reads a text's last token that is not "
        "the padding token, so give the model the same `pad_token_id`, as above."
    )
