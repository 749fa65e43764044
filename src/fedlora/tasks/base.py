"""What a task is: the kind of data that models are fine-tuned on, what they answer, and how answers are scored."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora.config import ModelConfig, SourceConfig
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.encoded import Encoded
from fedlora.data.partition import Parts
from fedlora.data.source import Source
from fedlora.models.generate import Hear
from fedlora.models.load import Given, Pretrained
from fedlora.models.trial import Findings
from fedlora.tasks.metrics import Array, Scoring

Answer = Mapping[str, Any]  # of one example: "answer" and what else there is to say, by name


@dataclass(frozen=True)
class Survey:
    """What becomes of a data set as a model takes it.

    Attributes:
        dataset: without what cannot be learned or scored, which its notes count.
        shown: the first training example as text, with what is learned of it between « and ».
        tokens: how many each training example has, (n,), before it is cut.
        trained: how many of them are learned, (n,), after.
        limit: where examples are cut.
        notes: what is cut.
    """

    dataset: Dataset
    shown: str
    tokens: np.ndarray
    trained: np.ndarray
    limit: int
    notes: tuple[str, ...]


class Turn(NamedTuple):
    """Of a conversation."""

    question: str
    answer: str


class Running(Protocol):
    """A model that can be asked for more than its outputs."""

    def outputs(self, data: Encoded) -> Array:
        """What it gives of examples, (n, outputs)."""

    def generate(self, prompts: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
        """What it writes after each prompt: token ids, at most `limit`."""


class Objective(Scoring, Protocol):
    """A task whose classes are known: what is minimised, and how answers are scored. Outputs are what a model gives of n examples,
    (n, outputs); a language model's are sums over the tokens of each that the loss is on, of what `models.likelihood` gives."""

    @property
    def schema(self) -> Schema:
        """What targets are."""

    @property
    def outputs(self) -> int:
        """How many numbers a model gives of an example."""

    def within(self, outputs: Tensor, domains: np.ndarray) -> Tensor:
        """Outputs as they count for examples of these domains, (n,): in classification, -inf for the classes of other domains."""

    def losses(self, outputs: Tensor, data: Encoded) -> Tensor:
        """The loss of each example, (n,)."""

    def weights(self, data: Encoded) -> np.ndarray:
        """What each example's loss counts in the mean of a batch, (n,): 1, or its tokens."""

    def sums(self, outputs: Array, data: Encoded) -> dict[str, Array]:
        """What `Scoring` adds up, but for what is of the constant answer."""

    def further(self, data: Encoded, model: Running) -> dict[str, Array]:
        """Those of the sums that outputs do not say: of what the model writes, or chooses."""

    def constant(self, data: Encoded, otherwise: Array | None = None) -> Array:
        """What one would always answer who knows these examples alone, (domains,), for each domain of a run of several; `otherwise`
        in a domain that has none of them."""

    def of_constant(self, constant: Array, data: Encoded, base: Running) -> dict[str, Array]:
        """The sums of that answer; where there is none that would do, of what the model answers as it was pre-trained, `base`."""


class Task(Protocol):
    """A task: a frozen dataclass whose fields are its settings, as `[task]` of a configuration has them.

    Attributes:
        TITLE: what it is called.
        INPUT: what an example is called, as in a column of answers.
        WRITES: whether its answers are texts that the model writes; it is a `Writing` then.
        COLUMNS: the keys of [data] that name columns of its tables, and FOUND, the names of columns that it finds by itself.
        DEFAULTS: tables of a configuration that suit it better than the usual ones.
        LACKS: of what methods' requests use (`types.Facts.asks`), what it cannot serve.
    """

    TITLE: ClassVar[str]
    INPUT: ClassVar[str]
    WRITES: ClassVar[bool]
    LACKS: ClassVar[frozenset[str]]
    COLUMNS: ClassVar[tuple[str, ...]]
    FOUND: ClassVar[tuple[str, ...]]
    DEFAULTS: ClassVar[Mapping[str, Any]]

    def find(self, config: SourceConfig) -> Source:
        """The tables of a source. BadInput when there is no such source."""

    def read(self, source: Source, config: SourceConfig, schema: Schema | None = None) -> Dataset:
        """The examples of a source; a test part that is not there is empty.

        Args:
            schema: where it is given, targets must fit it; else it is found in the data.

        Raises:
            BadInput: what is wrong, in which file, column and row.
        """

    def dealt(self, dataset: Dataset, parts: Parts) -> Dataset:
        """The data set as its clients have it: the same, but where clients see their inputs differently."""

    def load(
        self,
        config: ModelConfig,
        schema: Schema,
        seed: int,
        given: Given | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pretrained:
        """The model of a run. BadInput when there is no such model, or it is of another kind.

        Args:
            given: where it is at hand.
            dtype: in which it will compute: parameters that a checkpoint has in no higher precision may stay as they are.
        """

    def outline(self, config: ModelConfig, schema: Schema) -> Pretrained:
        """The same model without values, on torch's meta device, from its configuration alone."""

    def try_model(self, pretrained: Pretrained, targets: Sequence[str], limit: int) -> Findings:
        """How the model is run; `limit` is the longest input that is asked for."""

    def fitting(self, dataset: Dataset, pretrained: Pretrained, limit: int) -> Dataset:
        """The data set without examples that cannot be learned or scored, which its notes count. BadInput where none is left."""

    def survey(self, dataset: Dataset, config: ModelConfig, limit: int) -> "Survey | None":
        """What a model's inputs are made of the examples, before anything is loaded but what makes them; None of a task that has
        nothing to say of that. NoModel: there is none; BadInput: no example is left."""

    def encode(self, pretrained: Pretrained, split: Split, limit: int) -> Encoded:
        """Examples as the model takes them; `limit` is that of the findings."""

    def notes(self, train: Encoded, test: Encoded, limit: int) -> Iterator[str]:
        """What a user should know of the encoded examples. BadInput where nothing can be learned from them."""

    def bind(self, schema: Schema, pretrained: Pretrained | None = None) -> Objective:
        """The task of a run; without its model, to be asked for metrics alone."""

    def inputs(self, given: Sequence[str]) -> Iterator[Any]:
        """The inputs that arguments of the command line are."""

    def read_inputs(self, path: Path, config: SourceConfig) -> Iterator[Any]:
        """The inputs in a file, without targets. BadInput: why it cannot be read."""

    def read_lines(self, raw: Iterable[bytes], where: str) -> Iterator[Any]:
        """The inputs that lines are. BadInput names the line that is none."""

    def shown(self, given: Any) -> str:
        """An input in an answer for people."""

    def known(self, given: Any) -> Answer:
        """What an input's file says of it that stands beside its answer, by name; of a question it may be the right answer."""

    def answers(self, inputs: Sequence[Any], model: "Answering") -> list[Answer]:
        """What a model says to inputs: "label" or another name first, which is the answer. BadInput where it is no number."""

    def save_processor(self, pretrained: Pretrained, limit: int, padding: str, folder: Path) -> None:
        """Write the tokenizer, or what else makes inputs of examples, beside a result."""

    def card(self, result: "Result") -> "Card":
        """What a model card says of the task."""


class Writing(Task, Protocol):
    """A task whose answers are texts that the model writes, token by token."""

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer: a field."""

    def write(self, given: Any, model: "Answering", hear: Callable[[str], None]) -> Answer:
        """What it says to one input; `hear` is told each piece of the text as it comes."""

    def told(self, turns: Sequence[Turn], question: str, model: "Answering") -> tuple[Any, int]:
        """The input that a question is at the end of a conversation, and how many of the oldest turns are left out of it, because
        the model has no room for them."""


class Answering(Protocol):
    """A finished model, and what its answers mean."""

    @property
    def pretrained(self) -> Pretrained:
        """The model that it was made of."""

    @property
    def schema(self) -> Schema:
        """What targets were."""

    @property
    def domain(self) -> int | None:
        """The place of the inputs' data set among those of the run; None where it had one."""

    @property
    def limit(self) -> int:
        """The longest input, in tokens."""

    def outputs(self, inputs: Sequence[Any]) -> Array:
        """What it gives of each input, (n, outputs)."""

    def generate(self, prompts: Sequence[np.ndarray], limit: int, hear: Hear | None = None) -> list[np.ndarray]:
        """What it writes after each prompt: token ids, at most `limit`; `hear` is told of a single one as it grows."""


@dataclass(frozen=True)
class Result:
    """What is exported: the model with its classes; `limit` and `padding` of its inputs; a whole model or an adapter."""

    pretrained: Pretrained
    schema: Schema
    limit: int
    padding: str
    merged: bool


@dataclass(frozen=True)
class Card:
    """The task's part of a model card.

    Attributes:
        pipeline: the tag of the Hugging Face Hub.
        what: "A text classifier of 4 classes".
        of: what the score is a share of, "of the test texts".
        facts: rows of the table, name and value.
        code: lines of Python that use the folder.
        after: a paragraph below it.
        fields: for fedlora.json.
    """

    pipeline: str
    what: str
    of: str
    facts: Sequence[tuple[str, str]]
    code: Sequence[str]
    after: str
    fields: Mapping[str, Any]
