"""Answers to new inputs, from the model that the run scored: everybody's, or one client's; in a run of several data sets, as one of
the input's own."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, SourceConfig
from fedlora.data.dataset import Schema, Split
from fedlora.errors import BadInput, some, unknown
from fedlora.models.load import Given, Pretrained, doing
from fedlora.runs.export import located, read_result, which_client
from fedlora.runs.prepare import dtype_of, has_own_models, load_pretrained, make_task, make_trainer, try_pretrained
from fedlora.runs.roster import Roster
from fedlora.tasks.base import Answer, Task
from fedlora.training.batched import Trainer
from fedlora.training.score import ScoreJob, prompted
from fedlora.types import Model, Tensors

Say = Callable[[str], None]


class Format(Enum):
    """How answers are written."""

    TSV = "tsv"  # the answer, its probability, the input; tabs, line ends and backslashes inside are escaped with a backslash
    CSV = "csv"  # a header; the input, the answer, its probability, and that of every class
    JSON = "json"  # an object a line, with the same


@dataclass(frozen=True)
class Choice:
    """Which model of a run folder, not yet loaded.

    Attributes:
        domain: the place of the inputs' data set among the run's; None where it has one.
    """

    config: Config
    roster: Roster
    model: Model
    head: Tensors
    domain: int | None
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> SourceConfig:
        """The data set that inputs are of, and the column that holds them."""
        return self.config.data.sources[self.domain or 0]


@dataclass(frozen=True)
class Predictor:
    """A model that is loaded once, for as many inputs as there are; `note` hears what a user should know."""

    choice: Choice
    task: Task
    pretrained: Pretrained
    trainer: Trainer
    limit: int
    note: Say

    @property
    def schema(self) -> Schema:
        """What targets were."""
        return self.choice.roster.schema

    @property
    def domain(self) -> int | None:
        """The place of the inputs' data set among those of the run."""
        return self.choice.domain

    def outputs(self, inputs: Sequence[Any]) -> NDArray[Any]:
        """What the model gives for each input, (n, outputs)."""
        given = Split(tuple(inputs), np.zeros(len(inputs), dtype=np.int64), domains=self._domains(len(inputs)))
        data = self.task.encode(self.pretrained, given, self.limit)
        if data.cut:
            self.note(f"{data.cut:,} of {len(inputs):,} {self.task.INPUT}s are longer than {self.limit} tokens, and cut")
        (found,) = self.trainer.outputs([ScoreJob(self.choice.model, self.choice.head, data)])
        return found

    def generate(self, prompts: Sequence[np.ndarray], limit: int, streamer: Any = None) -> list[np.ndarray]:
        """What the model writes after each prompt, token ids; `streamer` hears it token by token, of a single prompt."""
        job = ScoreJob(self.choice.model, self.choice.head, prompted(prompts, self._domains(len(prompts))))
        return self.trainer.generate(job, limit, streamer)

    def _domains(self, count: int) -> NDArray[np.int64]:
        """That of so many inputs."""
        place = self.choice.domain
        return np.zeros(0 if place is None else count, dtype=np.int64) + (place or 0)

    def answers(self, inputs: Sequence[Any]) -> list[Answer]:
        """What the task makes of that. BadInput where the model's answers are no numbers."""
        return self.task.answers(inputs, self)


def choose(run: Path, client: int | str | None = None, domain: str | None = None) -> Choice:
    """The model of a run folder that was scored.

    Args:
        client: its number or its name, where clients have models of their own.
        domain: the data set that texts are of, where the run has several.

    Raises:
        BadInput: `run` has no such model; which ones it has.
    """
    id = None if client is None else which_client(run, client)
    config, roster, model, head = read_result(run, id)
    if id is None and has_own_models(config):
        names = some(roster.names, 10)
        raise BadInput(f"{run}: each client has a model of its own, and no common one was scored; give --client: {names}")
    place = _domain(run, roster, domain)
    notes: tuple[str, ...] = ()
    if id is not None and domain is not None and domain not in roster.clients[id].domains:
        notes = (f"{roster.names[id]} has no training example of {domain}, and its model was not scored on it",)
    return Choice(located(config, run), roster, model, head, place, notes)


def load(choice: Choice, note: Say = lambda text: None, stage: Say = lambda text: None, given: Given | None = None) -> Predictor:
    """Load a model, `given` where it is at hand; `stage` hears what is being done."""
    for text in choice.notes:
        note(text)
    config = choice.config
    stage(doing(config.model.source))
    pretrained = load_pretrained(config, choice.roster.schema, given, dtype_of(config))
    stage("trying the model")
    findings = try_pretrained(config, pretrained)
    task = make_task(config)
    trainer = make_trainer(config, pretrained, findings, task.bind(choice.roster.schema, pretrained))
    return Predictor(choice, task, pretrained, trainer, choice.roster.max_length or findings.limit, note)


def _domain(run: Path, roster: Roster, domain: str | None) -> int | None:
    names = [each.name for each in roster.schema.domains]
    if not names and domain is not None:
        raise BadInput(f"--domain {domain}: {run} is of one data set; leave --domain out")
    if not names:
        return None
    if domain is None:
        raise BadInput(f"{run}: a text was scored among the classes of its own data set; give --domain: {some(names, 10)}")
    if domain not in names:
        raise unknown("--domain", domain, names)
    return names.index(domain)


def predict(
    run: Path, inputs: Sequence[Any], note: Say = lambda text: None, client: int | str | None = None, domain: str | None = None
) -> list[Answer]:
    """The answer to each input; `choose` says by which model."""
    return load(choose(run, client, domain), note).answers(inputs)


def written(model: Predictor, batches: Iterable[Sequence[Any]], form: Format) -> Iterator[str]:
    """What is written for batches of inputs, a piece each."""
    headed = False
    for inputs in batches:
        rows = list(zip(map(model.task.shown, inputs), model.answers(inputs), strict=True))
        match form:
            case Format.TSV:
                yield "".join("\t".join([*_plain(answer, 3), _escaped(shown)]) + "\n" for shown, answer in rows)
            case Format.CSV:
                header = [] if headed else [[model.task.INPUT, *_header(rows[0][1])]]
                yield _csv([*header, *([shown, *_plain(answer, 6), *_spread(answer)] for shown, answer in rows)])
                headed = True
            case Format.JSON:
                yield "".join(
                    json.dumps({model.task.INPUT: shown, **_rounded(answer)}, ensure_ascii=False) + "\n" for shown, answer in rows
                )


def _plain(answer: Answer, digits: int) -> list[str]:
    """The values that are no table, the first of which is the answer."""
    plain = (x for x in answer.values() if not isinstance(x, Mapping))
    return [f"{x:.{digits}f}" if isinstance(x, float) else _escaped(str(x)) if digits == 3 else str(x) for x in plain]


def _spread(answer: Answer) -> list[str]:
    """The values of its tables."""
    return [f"{x:.6f}" for table in answer.values() if isinstance(table, Mapping) for x in table.values()]


def _header(answer: Answer) -> list[str]:
    tables = [name for table in answer.values() if isinstance(table, Mapping) for name in table]
    return [*(name for name, x in answer.items() if not isinstance(x, Mapping)), *(f"p({name})" for name in tables)]


def _rounded(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _rounded(value) for name, value in x.items()}
    return round(x, 6) if isinstance(x, float) else x


def _escaped(text: str) -> str:
    return text.translate({ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"})


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
