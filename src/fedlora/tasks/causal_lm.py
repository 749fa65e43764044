"""Causal language modelling: what follows a prompt, by a pre-trained decoder with its own head."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fedlora.config import ModelConfig, SourceConfig
from fedlora.data import columns, shapes
from fedlora.data.conversations import Example
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.encoded import Encoded
from fedlora.data.source import Part, Source
from fedlora.data.strata import LENGTHS, bins, in_characters
from fedlora.errors import BadInput, unknown
from fedlora.models import language
from fedlora.models.generate import context
from fedlora.models.likelihood import words
from fedlora.models.load import Given, Pretrained
from fedlora.names import part_of
from fedlora.tasks import prompts
from fedlora.tasks.base import Answer, Answering, Card, Result, Survey, Turn, Writing
from fedlora.tasks.language import METRICS, Answers, extracted
from fedlora.tasks.rendering import Rendered, choices, render, shown
from fedlora.tasks.texts import TextTask, loading

NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class CausalLM(TextTask):
    """Instruction tuning, chats and plain text: the loss is on answers, of plain text on all of it.

    Attributes:
        shape: of the data, one of `data.shapes.NAMES`, where it is not the one that is recognised.
        metrics: what models are scored by, the first being the one that runs are compared by: answer_loss, perplexity,
            token_accuracy; exact_match and rouge_l, of what the model writes; choice, among the choices of each example.
        pattern: of what counts in an exact match, a regular expression.
        max_new_tokens: of an answer that the model writes.
    """

    shape: str | None = None
    metrics: tuple[str, ...] = ("answer_loss", "perplexity", "token_accuracy")
    pattern: str | None = None
    max_new_tokens: int = 256

    TITLE: ClassVar[str] = "causal language modelling"
    INPUT: ClassVar[str] = "prompt"
    WRITES: ClassVar[bool] = True
    LACKS: ClassVar[frozenset[str]] = frozenset({"classes"})
    TOKENS: ClassVar[bool] = True
    COLUMNS: ClassVar[tuple[str, ...]] = ("text", "prompt", "completion", "messages", "choices")
    FOUND: ClassVar[tuple[str, ...]] = shapes.COLUMNS
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "model": {"source": "smollm2"},
        "data": {"max_length": 512},
        "train": {"batch_size": 8, "lr": 2e-4},
    }

    def __post_init__(self) -> None:
        strange = next((name for name in self.metrics if name not in METRICS), None)
        if strange is not None:
            raise unknown("metric", strange, METRICS)
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise BadInput(f"metrics = {list(self.metrics)}: each at most once, and at least one of {', '.join(METRICS)}")
        if self.max_new_tokens < 1:
            raise BadInput("max_new_tokens must be at least 1")
        try:
            extracted("", self.pattern)
        except re.error as error:
            raise BadInput(f"pattern = '{self.pattern}': not a regular expression: {error}") from error

    # ---- data ----------------------------------------------------------------------------------------------------------

    def find(self, config: SourceConfig) -> Source:
        return super().find(shapes.widened(config))

    def read(self, source: Source, config: SourceConfig, schema: Schema | None = None) -> Dataset:
        shape = shapes.recognise(source.train, config, self.shape)
        known = shapes.examples(source.train, shape)
        lengths = _lengths(known)

        def split(part: Part, inputs: tuple[str, ...]) -> Split:
            owners = columns.owners_of(part, config.column, needed=part is source.train)
            return Split(inputs, np.zeros(len(inputs), dtype=np.int64), owners, strata=bins(_lengths(inputs), lengths)[0])

        def scored(part: Part | None) -> Split | None:
            return None if part is None else split(part, shapes.examples(part, shape))

        return Dataset(
            source.name,
            split(source.train, known),
            scored(source.test) or Split((), NOTHING),
            Schema(prompts=(("chat" if shape.messages else shape.name, shape.column("prompt")),)) if schema is None else schema,
            (*source.notes, f"{source.name}: {shape}"),
            validation=scored(source.validation),
            strata_names=in_characters((), lengths)[1],
            strata_kind=LENGTHS,
            things="examples",
        )

    def fitting(self, dataset: Dataset, pretrained: Pretrained, limit: int) -> Dataset:
        parts: dict[str, Split] = {}
        notes: list[str] = []
        for name, part in dataset.parts:
            rendered = [render(pretrained.processor, Example.from_json(x), limit) for x in part.inputs]
            unfit = [i for i, each in enumerate(rendered) if each.fault]
            parts[name] = part.take(np.array([i for i, each in enumerate(rendered) if not each.fault], dtype=np.int64))
            if unfit:
                counts = Counter(rendered[i].fault for i in unfit).most_common()
                told = ", ".join(f"{count:,} for {why}" for why, count in counts)
                first = " ".join(prompts.whole(Example.from_json(part.inputs[unfit[0]])).split())
                which = f"the first: {prompts.excerpt(first)}"
                if len(unfit) == len(part):
                    raise BadInput(f"no {name} example of {dataset.name} can be used: {told}; {which}")
                notes.append(f"{part_of(len(unfit), len(part), f'{name} example')} left out: {told}; {which}")
            self._require_pattern(dataset.name, parts[name])
            self._require_choices(dataset.name, name, parts[name])
        if not notes:
            return dataset
        train, test = parts["training"], parts["test"]
        return replace(dataset, train=train, test=test, validation=parts.get("validation"), notes=(*dataset.notes, *notes))

    def survey(self, dataset: Dataset, config: ModelConfig, limit: int) -> Survey:
        pretrained = language.without_model(config)
        limit = min(limit, pretrained.processor.model_max_length)
        found = self.fitting(dataset, pretrained, limit)
        train, test = (self.encode(pretrained, part, limit) for part in (found.train, found.test))
        whole = [render(pretrained.processor, Example.from_json(x)) for x in found.train.inputs]
        tokens = np.array([len(each.ids) for each in whole], dtype=np.int64)
        notes = tuple(self.notes(train, test, limit))
        return Survey(found, shown(whole[0], pretrained.processor), tokens, train.targets, limit, notes)

    def _require_pattern(self, name: str, part: Split) -> None:
        """BadInput where no answer is one by the pattern, so that none could match."""
        if self.pattern is None or "exact_match" not in self.metrics or not len(part):
            return
        answers = [Example.from_json(x).reference for x in part.inputs]
        if all(extracted(answer, self.pattern) is None for answer in answers):
            raise BadInput(f"task.pattern = '{self.pattern}' is in no answer of {name}, as in: {answers[0][-80:]!r}")

    def _require_choices(self, name: str, which: str, part: Split) -> None:
        """BadInput where there is nothing to choose among, so that there would be no such score."""
        if "choice" in self.metrics and which != "training" and not any(Example.from_json(x).choices for x in part.inputs):
            raise BadInput(f"task.metrics: choice needs examples with choices, and no {which} example of {name} has any")

    def encode(self, pretrained: Pretrained, split: Split, limit: int) -> Encoded:
        tokenizer = pretrained.processor
        found = [Example.from_json(x) for x in split.inputs]
        rendered = [render(tokenizer, each, limit) for each in found]
        several: tuple[Encoded, ...] = ()
        if "choice" in self.metrics and any(each.choices for each in found):
            several = tuple(_encoded(_right_first(choices(tokenizer, each, limit), each.answer)) for each in found)
        return replace(_encoded(rendered), domains=split.domains, cut=sum(each.cut for each in rendered), choices=several)

    def notes(self, train: Encoded, test: Encoded, limit: int) -> Iterator[str]:
        for name, part in (("training", train), ("test", test)):
            if part.cut:
                longer = part_of(part.cut, len(part), f"{name} example")
                yield f"{longer} longer than {limit} tokens, and without the end of an answer"

    # ---- model ---------------------------------------------------------------------------------------------------------

    def load(
        self,
        config: ModelConfig,
        schema: Schema,
        seed: int,
        given: Given | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pretrained:
        return language.load(config, seed, given, dtype)

    def outline(self, config: ModelConfig, schema: Schema) -> Pretrained:
        return language.outline(config)

    def bind(self, schema: Schema, pretrained: Pretrained | None = None) -> Answers:
        tokenizer, known = (None, 0) if pretrained is None else (pretrained.processor, words(pretrained.model))
        room = None if pretrained is None else context(pretrained.model)
        if room is not None and self.max_new_tokens > max(room, CausalLM.max_new_tokens):
            raise BadInput(f"max_new_tokens = {self.max_new_tokens:,}: the model takes {room:,} tokens, prompt and answer together")
        return Answers(schema, self.metrics, tokenizer, known, self.max_new_tokens, self.pattern)

    # ---- answers -------------------------------------------------------------------------------------------------------

    def inputs(self, given: Sequence[Any]) -> Iterator[prompts.Given]:
        return prompts.given(given)

    def read_inputs(self, path: Path, config: SourceConfig) -> Iterator[prompts.Given]:
        return prompts.read(path, config, self.shape)

    def shown(self, given: prompts.Given) -> str:
        return prompts.shown(given)

    def known(self, given: prompts.Given) -> Answer:
        return {} if isinstance(given, str) or given.kind == "text" else {"reference": given.reference}

    def answers(self, inputs: Sequence[Any], model: Answering) -> list[Answer]:
        written = model.generate([prompts.ids_of(each, model) for each in inputs], self.max_new_tokens)
        return [_answer(model.pretrained.processor, ids) for ids in written]

    def write(self, given: Any, model: Answering, hear: Callable[[str], None]) -> Answer:
        tokenizer = model.pretrained.processor
        heard = prompts.pieces(partial(_text, tokenizer), hear)
        (ids,) = model.generate([prompts.ids_of(given, model)], self.max_new_tokens, heard)
        heard(ids, whole=True)
        return _answer(tokenizer, ids)

    def told(self, turns: Sequence[Turn], question: str, model: Answering) -> tuple[Any, int]:
        return prompts.told(turns, question, model, self.max_new_tokens)

    # ---- results -------------------------------------------------------------------------------------------------------

    def save_processor(self, pretrained: Pretrained, limit: int, padding: str, folder: Path) -> None:
        """As it came: what the base's tokenizer does, this one does."""
        pretrained.processor.save_pretrained(folder)

    def card(self, result: Result) -> Card:
        kinds = [name for name, _ in result.schema.prompts]
        prompt = (
            'tokenizer.apply_chat_template([{"role": "user", "content": "a question"}], add_generation_prompt=True, '
            'return_tensors="pt", return_dict=True)'
            if kinds[0] == "chat"
            else 'tokenizer("a prompt", return_tensors="pt")'
        )
        answers = [] if kinds == ["text"] else ["It was trained on answers alone: the loss was on no token of a prompt."]
        return Card(
            pipeline="text-generation",
            what="A language model",
            of="on the test examples",
            facts=(("longest example", f"{result.limit} tokens"), ("prompts", ", ".join(kinds))),
            code=[
                *loading(result, "CausalLM"),
                f"inputs = {prompt}",
                "written = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
                'print(tokenizer.decode(written[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
            ],
            after=" ".join([*answers, *(f"Of its base: {note}." for note in result.pretrained.notes)]),
            fields={"max_length": result.limit, "prompts": [list(each) for each in result.schema.prompts]},
        )


def _lengths(inputs: Sequence[str]) -> list[int]:
    return [Example.from_json(x).length for x in inputs]


def _encoded(rendered: Sequence[Rendered]) -> Encoded:
    counts = np.array([int(each.trained.sum()) for each in rendered], dtype=np.int64)
    sizes = np.array([len(each.ids) for each in rendered], dtype=np.int64)
    return Encoded(tuple(each.ids for each in rendered), counts, sizes, trained=tuple(each.trained for each in rendered))


def _right_first(each: Sequence[Rendered], answer: int | None) -> list[Rendered]:
    """Choices with the right one before the others."""
    return [] if answer is None else [each[answer], *(x for i, x in enumerate(each) if i != answer)]


def _text(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _answer(tokenizer: Any, ids: np.ndarray) -> Answer:
    return {"answer": _text(tokenizer, ids), "tokens": len(ids)}


TASK: type[Writing] = CausalLM
