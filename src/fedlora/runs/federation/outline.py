"""What a server knows of the model without its weights: shapes, what the seed drew, and digests that all must agree on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora import __version__, wire
from fedlora.config import Config, decisive
from fedlora.data.dataset import Domain, Schema
from fedlora.disk import digest
from fedlora.errors import BadInput
from fedlora.models.load import Pretrained, revision_of
from fedlora.runs.federation.folder import Federation
from fedlora.runs.prepare import Loaded, make_task, with_source
from fedlora.tasks.base import Objective
from fedlora.types import Tensors

SAMPLED = 64  # numbers of each adapted layer that the digest of the weights is of


@dataclass(frozen=True)
class Outline:
    """A model without its weights.

    Attributes:
        schema: what targets and inputs are.
        shapes, params, transposed: as a trainer has them.
        head: its parameters as the seed drew them; `drawn` what else the checkpoint lacks.
        source, revision: where others find the base.
        max_length, padding: of its inputs.
        facts: what must be the same on all machines, by name.
    """

    schema: Schema
    shapes: Mapping[str, tuple[int, int]]
    params: Mapping[str, tuple[int, ...]]
    transposed: tuple[str, ...]
    head: Tensors
    drawn: Tensors
    source: str
    revision: str | None
    max_length: int
    padding: str
    facts: Mapping[str, str]


def outline_of(config: Config, schema: Schema, loaded: Loaded) -> Outline:
    """The outline of a model that is there whole."""
    trainer, pretrained = loaded.trainer, loaded.pretrained
    return Outline(
        schema=schema,
        shapes={m: (o, i) for m, (o, i) in trainer.shapes.items()},
        params=dict(trainer.params),
        transposed=tuple(sorted(trainer.transposed)),
        head=dict(trainer.head),
        drawn={name: trainer.base.pretrained[name].float() for name in pretrained.drawn},
        source=pretrained.source,
        revision=revision_of(config.model.source),
        max_length=loaded.findings.limit,
        padding=loaded.findings.form.padding,
        facts=facts(config, schema, loaded),
    )


def facts(config: Config, schema: Schema, loaded: Loaded) -> dict[str, str]:
    """What machines must agree on, by name. How fast, how exactly and on what they compute is each one's own matter."""
    trainer = loaded.trainer
    sampled = [_sample(trainer.base_weight(m)) for m in trainer.shapes]
    return {
        "fedlora": __version__,
        "settings": settings(config),
        "labels" if schema.label_names else "targets": _digest(asdict(schema)),
        "adapted layers": _digest({m: list(shape) for m, shape in trainer.shapes.items()}),
        "weights of the model": digest(torch.cat(sampled).view(torch.int16).numpy().tobytes())[:12],
        "vocabulary": _digest(_vocabulary(loaded.pretrained.processor)),
    }


def settings(config: Config) -> str:
    """A digest of what of the configuration must be the same everywhere."""
    tables = decisive(config)
    for place in ("device", "precision"):
        tables.pop(place)
    tables["model"].pop("source")
    for own in ("source", "delimiter", "encoding"):
        tables["data"].pop(own, None)
    return _digest(tables)


def _sample(weight: Tensor) -> Tensor:
    """Some numbers of a weight, as coarse as bf16 has them."""
    flat = weight.flatten()
    return flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].bfloat16()


def _vocabulary(processor: Any) -> Any:
    """What makes inputs, as plain values: a tokenizer's words and template."""
    words: dict[str, int] = getattr(processor, "get_vocab", dict)()
    return [sorted(words.items()), getattr(processor, "chat_template", None)]


def _digest(values: Any) -> str:
    return digest(json.dumps(values, sort_keys=True, default=str).encode())[:12]


def write(federation: Federation, outline: Outline) -> None:
    federation.outline.write_bytes(wire.encode(outline))


def read(federation: Federation) -> Outline:
    """BadInput: it is missing or damaged, or the configuration beside it has changed since, so that no client would fit."""
    try:
        found: Outline = wire.decode(federation.outline.read_bytes(), [Outline, Schema, Domain])
    except (OSError, ValueError) as error:
        raise BadInput(f"{federation.outline}: missing or damaged ({error}); fedlora federate init makes it") from error
    if found.facts["settings"] != settings(federation.config):
        raise BadInput(
            f"{federation.path}/federation.toml was changed after fedlora federate init, so clients that have it as it was would "
            "be left out; put it back, or make the folder anew with init ([transport], and where and how to compute, may change)"
        )
    return found


class Outlined:
    """Of a trainer, what a server without weights has (`fedlora.training.trainer.Outlined`)."""

    device, dtype = torch.device("cpu"), torch.float32
    rows = 1

    def __init__(self, outline: Outline, objective: Objective) -> None:
        self.outline, self.objective = outline, objective
        self.shapes, self.params, self.head = outline.shapes, outline.params, outline.head
        self.transposed = frozenset(outline.transposed)

    def base_weight(self, module: str) -> Tensor:
        """BadInput: it is not here."""
        raise BadInput("this method needs the weights of the model on the server: give fedlora federate server --model")


def pretrained_of(config: Config, federation: Federation, outline: Outline) -> Pretrained:
    """The model with the values that the outline has, and no others: memory that was never written to."""
    from transformers import AutoTokenizer

    pretrained = make_task(config).outline(with_source(config, federation.model).model, outline.schema)
    model = pretrained.model.to_empty(device="cpu").requires_grad_(False).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in {**outline.head, **outline.drawn}.items():
            parameters[name].copy_(value)
    tokenizer = AutoTokenizer.from_pretrained(federation.model)
    return replace(pretrained, model=model, processor=tokenizer, source=outline.source, drawn=tuple(outline.drawn))


def save_processor(config: Config, loaded: Loaded, folder: Path) -> None:
    """Write what makes inputs, and the model's configuration, which is all that its outline is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded.pretrained.model.config.save_pretrained(folder)
    make_task(config).save_processor(loaded.pretrained, loaded.findings.limit, loaded.findings.form.padding, folder)
