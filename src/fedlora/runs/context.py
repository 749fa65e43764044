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
from fedlora.training import batched
from fedlora.training.trainer import Outlined
from fedlora.transforms.pipeline import Pipeline
from fedlora.types import Client, Method, Setup


@dataclass(frozen=True, kw_only=True)
class Played:
    """What it takes to play any run.

    Attributes:
        trainer: the server's own, or the outline of one, from which it knows the model.
        held_out: clients that never train; their ids follow those of the setup's.
    """

    config: Config
    method: Method
    transforms: Pipeline
    setup: Setup
    trainer: Outlined
    roster: Roster
    held_out: tuple[Client, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunContext(Played):
    """Everything that a run works with whose data are dealt here.

    Attributes:
        train: the training examples of each client, and `all_train` those of the whole data set.
        given: the model as it was given in Python; None where the configuration names it.
    """

    trainer: batched.Trainer
    task: Task
    findings: Findings
    all_train: Encoded
    train: Mapping[int, Encoded]
    test: Encoded
    validation: Encoded | None
    dataset: Dataset
    parts: Parts
    given: Given | None = None
