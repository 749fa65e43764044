"""Image classification: one of some classes for each image."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fedlora.config import ModelConfig, SourceConfig
from fedlora.data import images
from fedlora.data.dataset import Dataset, Integers, Schema, Split
from fedlora.data.encoded import Encoded
from fedlora.data.partition import Parts
from fedlora.data.source import Source
from fedlora.errors import BadInput
from fedlora.models import vision
from fedlora.models.load import Given, Pretrained
from fedlora.models.trial import Findings
from fedlora.tasks import classification
from fedlora.tasks.base import Answer, Answering, Card, Result, Survey, Task
from fedlora.tasks.classification import Classes


@dataclass(frozen=True)
class ImageClassification:
    """Images with classes, by a pre-trained model with a head for image classification, or a small one drawn from the seed: `mlp`,
    a perceptron, or `vit-tiny`, a transformer.

    Attributes:
        size: pixels of a side to which images are stretched, where it is not that of a pre-trained model, or of the images.
        rotations: degrees, counter-clockwise: of n of them, those of client k are turned by number k modulo n, for training and for
            scoring.
    """

    size: int | None = None
    rotations: tuple[float, ...] = ()

    TITLE: ClassVar[str] = "image classification"
    INPUT: ClassVar[str] = "image"
    WRITES: ClassVar[bool] = False
    LACKS: ClassVar[frozenset[str]] = frozenset()
    COLUMNS: ClassVar[tuple[str, ...]] = ("image", "label")
    FOUND: ClassVar[tuple[str, ...]] = ()
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise BadInput("size must be at least 1")

    # ---- data ----------------------------------------------------------------------------------------------------------

    def find(self, config: SourceConfig) -> Source:
        return images.find(config)

    def read(self, source: Source, config: SourceConfig, schema: Schema | None = None) -> Dataset:
        parts = [part for part in (source.train, source.test, source.validation) if part is not None]
        found = {part.where: images.of_column(part, config.image) for part in parts}
        shape = images.common_shape(found[source.train.where][1], self.size) if schema is None else schema.shape
        return classification.read(source, config, schema, lambda part: found[part.where][0], "images", shape)

    def dealt(self, dataset: Dataset, parts: Parts) -> Dataset:
        if not self.rotations:
            return dataset
        train, test = (
            self._turned(*each) for each in (("training", dataset.train, parts.train), ("test", dataset.test, parts.test))
        )
        validation = dataset.validation and self._turned("validation", dataset.validation, parts.validation)
        return replace(dataset, train=train, test=test, validation=validation)

    def _turned(self, name: str, part: Split, owned: Sequence[Integers]) -> Split:
        """A part with each client's images turned; those of nobody stay as they are."""
        inputs, seen = list(part.inputs), set[int]()
        for k, rows in enumerate(owned):
            for row in map(int, rows):
                if row in seen:
                    raise BadInput(
                        f"task.rotations: images of the {name} part belong to several clients, who would turn them otherwise; "
                        "give that part the column of owners, too"
                    )
                seen.add(row)
                inputs[row] = images.turned(inputs[row], self.rotations[k % len(self.rotations)])
        return replace(part, inputs=tuple(inputs))

    # ---- model ---------------------------------------------------------------------------------------------------------

    def load(
        self,
        config: ModelConfig,
        schema: Schema,
        seed: int,
        given: Given | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pretrained:
        return vision.load(config, schema.label_names, schema.shape, seed, self.size, given)

    def outline(self, config: ModelConfig, schema: Schema) -> Pretrained:
        return vision.outline(config, schema.label_names, schema.shape)

    def try_model(self, pretrained: Pretrained, targets: Sequence[str], limit: int) -> Findings:
        return vision.try_model(pretrained.model, targets, vision.shape_of(pretrained))

    def fitting(self, dataset: Dataset, pretrained: Pretrained, limit: int) -> Dataset:
        return dataset

    def survey(self, dataset: Dataset, config: ModelConfig, limit: int) -> Survey | None:
        return None

    def encode(self, pretrained: Pretrained, split: Split, limit: int) -> Encoded:
        """`limit` is how many rows an image is in the model's layers."""
        pixels = _pixels(pretrained)
        arrays = tuple(pixels.of(image) for image in split.inputs)
        return Encoded(arrays, split.targets, np.full(len(split), limit, dtype=np.int64), split.domains)

    def notes(self, train: Encoded, test: Encoded, limit: int) -> Iterator[str]:
        if len({image.tobytes() for image in train.inputs[:100]}) == 1 < len(train):
            raise BadInput("the first training images are all alike, and nothing can be learned from them")
        yield from ()

    def bind(self, schema: Schema, pretrained: Pretrained | None = None) -> Classes:
        return Classes(schema)

    # ---- answers -------------------------------------------------------------------------------------------------------

    def inputs(self, given: Sequence[str]) -> Iterator[images.Given]:
        return images.arguments(given)

    def read_inputs(self, path: Path, config: SourceConfig) -> Iterator[images.Given]:
        return images.read(path, config)

    def read_lines(self, raw: Iterable[bytes], where: str) -> Iterator[images.Given]:
        return images.lines(raw, where)

    def shown(self, given: Any) -> str:
        return given if isinstance(given, str) else f"{len(given):,} bytes"

    def known(self, given: Any) -> Answer:
        return {}

    def answers(self, inputs: Sequence[Any], model: Answering) -> list[Answer]:
        return classification.answers(inputs, model)

    # ---- results -------------------------------------------------------------------------------------------------------

    def save_processor(self, pretrained: Pretrained, limit: int, padding: str, folder: Path) -> None:
        pretrained.processor.save_pretrained(folder)

    def card(self, result: Result) -> Card:
        labels, shape = result.schema.label_names, vision.shape_of(result.pretrained)
        kind = "grey" if shape[0] == 1 else "RGB"
        return Card(
            pipeline="image-classification",
            what=f"A classifier of images of {len(labels)} classes",
            of="of the test images",
            facts=(("images", f"{shape[1]} x {shape[2]}, {kind}"),),
            code=_how_to_use(result),
            after=f"Images are stretched to {shape[1]} x {shape[2]} pixels, as the processor in this folder does it.",
            fields={"num_labels": len(labels), "id2label": {str(i): name for i, name in enumerate(labels)}, "shape": list(shape)},
        )


def _pixels(pretrained: Pretrained) -> images.Pixels:
    own = pretrained.processor
    return images.Pixels(vision.shape_of(pretrained), tuple(own.image_mean), tuple(own.image_std), int(own.resample))


def _how_to_use(result: Result) -> list[str]:
    """Lines of Python that use an exported folder."""
    model, kind = result.pretrained.model, "AutoModelForImageClassification"
    mode, own = "L" if vision.shape_of(result.pretrained)[0] == 1 else "RGB", type(model).__module__.startswith("fedlora.")
    load = [f"model = {kind}.from_pretrained(folder).eval()"]
    if not result.merged:
        known = f"id2label={dict(enumerate(result.schema.label_names))!r}, ignore_mismatched_sizes=True, dtype='float32'"
        load = [
            f"base = {kind}.from_pretrained({result.pretrained.source!r}, {known})",
            "model = PeftModel.from_pretrained(base, folder).eval()",
        ]
    return [
        *([] if result.merged else ["from peft import PeftModel"]),
        "from PIL import Image",
        f"from transformers import AutoImageProcessor, {kind}",
        *([f"import {type(model).__module__}  # makes the model known to transformers"] if own else []),
        'folder = "."  # this folder',
        *load,
        "processor = AutoImageProcessor.from_pretrained(folder)",
        f'image = Image.open("an image.png").convert("{mode}")',
        'logits = model(**processor(image, return_tensors="pt")).logits',
        "print([model.config.id2label[i] for i in logits.argmax(-1).tolist()])",
    ]


TASK: type[Task] = ImageClassification
