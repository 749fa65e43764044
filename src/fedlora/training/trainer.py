"""What a worker asks of its trainer: many clients' over one base (`training.batched`), or one client's own transformers.Trainer
(`training.hf`)."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora.data.encoded import Encoded
from fedlora.tasks.base import Running
from fedlora.tasks.metrics import Array, Scoring
from fedlora.training.learner import Job, Outcome
from fedlora.training.score import ScoreJob
from fedlora.types import BaseUpdate, Observe, Observed, Tensors


class Judge(Scoring, Protocol):
    """How models are scored, and a constant answer beside them."""

    def of_constant(self, constant: Array, data: Encoded, base: Any) -> dict[str, Array]:
        """The sums of that answer; where there is none that would do, of what the model answers as it was at the start, `base`."""


class Outlined(Protocol):
    """What a server must know of the model that its clients train.

    Attributes:
        rows: what fills a step of training; with 1 every client trains by itself. A run that is resumed keeps it.
    """

    rows: int

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen model computes in."""

    @property
    def objective(self) -> Judge:
        """How models are scored."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Target module -> (d_out, d_in)."""

    @property
    def params(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter name -> shape, of what full fine-tuning trains; empty where there is none."""

    @property
    def transposed(self) -> frozenset[str]:
        """The target modules whose weight parameter is stored (d_in, d_out)."""

    @property
    def head(self) -> Tensors:
        """The head's parameters as they were at the start, fp32."""

    def base_weight(self, module: str) -> Tensor:
        """The pre-trained weight of a target module, (d_out, d_in) in fp32. BadInput: it is not here."""


class Trainer(Outlined, Protocol):
    """Trains, observes and scores on a base model that stays in memory."""

    @property
    def untrained(self) -> Running | None:
        """The model as it was at the start, to be asked by `objective.of_constant`; None where that asks nothing."""

    @property
    def version(self) -> int:
        """Of the base."""

    def refuses(self, asks: frozenset[str]) -> list[str]:
        """Which of these, in the words of `types.Facts.asks`, it cannot do."""

    def fold(self, update: BaseUpdate) -> bool:
        """Bring the base to `update.version`; False where the update starts after the version that it is at."""

    def train(self, jobs: deque[Job], on_examples: Callable[[int], None] = lambda n: None) -> Iterator[tuple[Job, Outcome]]:
        """Take jobs from the left until there are none and all are done; each with its outcome, as they finish. Jobs may be added
        meanwhile. `on_examples` hears of examples that were trained on."""

    def observe(self, ask: Observe, data: Encoded, seed: int) -> Observed:
        """A statistic of a client's data."""

    def sums(self, jobs: Iterable[ScoreJob]) -> Iterator[dict[str, Array]]:
        """What `objective` adds up over the examples of each job, but for what is of the constant answer."""
