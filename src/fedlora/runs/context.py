"""What a run works with, once it is prepared."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.config import Config
from fedlora.data.dataset import Dataset
from fedlora.data.partition import Parts
from fedlora.models.trial import Findings
from fedlora.runs.roster import Roster
from fedlora.training.batched import Trainer
from fedlora.training.encode import Encoded
from fedlora.transforms.pipeline import Pipeline
from fedlora.types import Client, Method, Setup


@dataclass(frozen=True)
class RunContext:
    """Everything that a run works with. `held_out` are clients that never train; their ids follow those of the setup's."""

    config: Config
    method: Method
    transforms: Pipeline
    setup: Setup
    trainer: Trainer
    findings: Findings
    roster: Roster
    train: Mapping[int, Encoded]
    test: Encoded
    validation: Encoded | None
    dataset: Dataset
    parts: Parts
    held_out: tuple[Client, ...] = ()
