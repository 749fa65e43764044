"""Text classification: one of some classes for each text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from fedlora.config import ModelConfig, SourceConfig
from fedlora.data import columns
from fedlora.data.dataset import Dataset, Schema
from fedlora.data.source import Source
from fedlora.models.load import Given, Pretrained, load
from fedlora.tasks import classification
from fedlora.tasks.base import Answer, Answering, Card, Result, Task
from fedlora.tasks.classification import Classes
from fedlora.tasks.texts import TextTask, fields, how_to_use, on_padding


@dataclass(frozen=True)
class TextClassification(TextTask):
    """Texts with classes, by a pre-trained encoder or decoder with a head for sequence classification."""

    TITLE: ClassVar[str] = "text classification"
    LACKS: ClassVar[frozenset[str]] = frozenset()

    def read(self, source: Source, config: SourceConfig, schema: Schema | None = None) -> Dataset:
        return classification.read(source, config, schema, partial(columns.texts, name=config.text), "texts")

    def load(
        self,
        config: ModelConfig,
        schema: Schema,
        seed: int,
        given: Given | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pretrained:
        labels = dict(enumerate(schema.label_names))
        known = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
        return load(config, seed, given, num_labels=len(labels), problem_type="single_label_classification", **known)

    def bind(self, schema: Schema, pretrained: Pretrained | None = None) -> Classes:
        return Classes(schema)

    def answers(self, inputs: Sequence[Any], model: Answering) -> list[Answer]:
        return classification.answers(inputs, model)

    def card(self, result: Result) -> Card:
        labels: Sequence[str] = result.schema.label_names
        id2label = dict(enumerate(labels))
        last = "print([model.config.id2label[i] for i in logits.argmax(-1).tolist()])"
        return Card(
            pipeline="text-classification",
            what=f"A text classifier of {len(labels)} classes",
            of="of the test texts",
            facts=(("longest text", f"{result.limit} tokens"),),
            code=how_to_use(result, "SequenceClassification", f"id2label={id2label!r}", last),
            after=on_padding(result),
            fields={"num_labels": len(labels), "id2label": {str(i): name for i, name in id2label.items()}, **fields(result)},
        )


TASK: type[Task] = TextClassification
