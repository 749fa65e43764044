"""What a run works with, once it is prepared."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.config import Config
from fedlora.data.dataset import Dataset
from fedlora.data.encoded import Encoded
from fedlora.data.partition import Parts
from fedlora.models.load import Given
from fedlora.models.trial import Findings
from fedlora.runs.roster import Roster
from fedlora.tasks.base import Task
from fedlora.training.batched import Trainer
from fedlora.transforms.pipeline import Pipeline
from fedlora.types import Client, Method, Setup


@dataclass(frozen=True)
class RunContext:
    """Everything that a run works with.

    Attributes:
        train: the training examples of each client, and `all_train` those of the whole data set.
        given: the model as it was given in Python; None where the configuration names it.
        held_out: clients that never train; their ids follow those of the setup's.
    """

    config: Config
    task: Task
    method: Method
    transforms: Pipeline
    setup: Setup
    trainer: Trainer
    findings: Findings
    roster: Roster
    all_train: Encoded
    train: Mapping[int, Encoded]
    test: Encoded
    validation: Encoded | None
    dataset: Dataset
    parts: Parts
    held_out: tuple[Client, ...] = ()
    given: Given | None = None
