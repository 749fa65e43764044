"""Answers to new inputs, from the model that the run scored: everybody's, or one client's; in a run of several data sets, as one of
the input's own."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, SourceConfig
from fedlora.data.dataset import Schema, Split
from fedlora.errors import BadInput, some, unknown
from fedlora.models.generate import Hear
from fedlora.models.load import Given, Pretrained, doing
from fedlora.names import part_of
from fedlora.runs.export import located, read_result, which_client
from fedlora.runs.prepare import has_own_models, load_pretrained, make_task, make_trainer, try_pretrained
from fedlora.runs.roster import Roster
from fedlora.tasks.base import Answer, Task, Turn, Writing
from fedlora.training.batched import Trainer
from fedlora.training.precision import dtype_of
from fedlora.training.score import ScoreJob, prompted
from fedlora.types import Model, Tensors

Say = Callable[[str], None]


class Format(Enum):
    """How answers are written."""

    TSV = "tsv"  # the answer, its probability or its tokens, the input; tabs, line ends and backslashes inside have a backslash
    CSV = "csv"  # a header; the input, the answer, its probability, and that of every class
    JSON = "json"  # an object a line, with the same; the last two have what the input's file knows of it, too


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
            self.note(f"{part_of(data.cut, len(inputs), self.task.INPUT)} longer than {self.limit} tokens, and cut")
        (found,) = self.trainer.outputs([ScoreJob(self.choice.model, self.choice.head, data)])
        return found

    @property
    def base(self) -> "Predictor":
        """The same without what was learned: the model as it was pre-trained."""
        return replace(self, choice=replace(self.choice, model=Model(), head={}))

    def generate(self, prompts: Sequence[np.ndarray], limit: int, hear: Hear | None = None) -> list[np.ndarray]:
        """What the model writes after each prompt, token ids; `hear` is told of a single one as it grows."""
        job = ScoreJob(self.choice.model, self.choice.head, prompted(prompts, self._domains(len(prompts))))
        return self.trainer.generate(job, limit, hear)

    def _domains(self, count: int) -> NDArray[np.int64]:
        """That of so many inputs."""
        place = self.choice.domain
        return np.zeros(0 if place is None else count, dtype=np.int64) + (place or 0)

    def answers(self, inputs: Sequence[Any]) -> list[Answer]:
        """What the task makes of that. BadInput where the model's answers are no numbers."""
        return self.task.answers(inputs, self)

    def beside_base(self, inputs: Sequence[Any]) -> list[Answer]:
        """Answers of the model as it was pre-trained, and of this one: "base" and "tuned"."""
        pairs = zip(self.base.answers(inputs), self.answers(inputs), strict=True)
        return [{"base": _said(base), "tuned": _said(tuned)} for base, tuned in pairs]

    def write(self, given: Any, hear: Say) -> str:
        """The text that it writes for one input; `hear` is told each piece of it as it comes."""
        return str(_said(writing(self.task, "a text as it is written").write(given, self, hear)))

    def told(self, turns: Sequence[Turn], question: str) -> tuple[Any, int]:
        """A question at the end of a conversation as an input, and how many of the oldest turns there is no room for."""
        return writing(self.task, "a conversation").told(turns, question, self)


def writing(task: Task, what: str) -> Writing:
    """The task, where it is one whose answers are texts that the model writes. BadInput: `what` it cannot serve."""
    if not task.WRITES:
        raise BadInput(f"{what}: {task.TITLE} does not write text, and has no such thing; leave it out")
    return cast(Writing, task)


def _said(answer: Answer) -> Any:
    """The answer itself, which is first."""
    return next(iter(answer.values()))


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


def load(
    choice: Choice,
    note: Say = lambda text: None,
    stage: Say = lambda text: None,
    given: Given | None = None,
    max_new_tokens: int | None = None,
) -> Predictor:
    """Load a model, `given` where it is at hand; `stage` hears what is being done. `max_new_tokens` replaces that of the run, for a
    task that writes. BadInput: it is none."""
    for text in choice.notes:
        note(text)
    config, task = choice.config, make_task(choice.config)
    if max_new_tokens is not None:
        task = cast(Task, replace(writing(task, "max_new_tokens"), max_new_tokens=max_new_tokens))  # type: ignore[type-var]
    stage(doing(config.model.source))
    pretrained = load_pretrained(config, choice.roster.schema, given, dtype_of(config))
    stage("trying the model")
    findings = try_pretrained(config, pretrained)
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


def written(model: Predictor, batches: Iterable[Sequence[Any]], form: Format, compare: bool = False) -> Iterator[str]:
    """What is written for batches of inputs, a piece each; with `compare`, what the base says beside it."""
    headed = False
    for inputs in batches:
        found = model.beside_base(inputs) if compare else model.answers(inputs)
        rows = list(zip(map(model.task.shown, inputs), found, map(model.task.known, inputs), strict=True))
        match form:
            case Format.TSV:
                yield "".join("\t".join([*_plain(answer, 3), _escaped(shown)]) + "\n" for shown, answer, _ in rows)
            case Format.CSV:
                _, answer, known = rows[0]
                header = [] if headed else [[model.task.INPUT, *_header(answer), *known]]
                each = ([shown, *_plain(answer, 6), *_spread(answer), *known.values()] for shown, answer, known in rows)
                yield _csv([*header, *each])
                headed = True
            case Format.JSON:
                whole = ({model.task.INPUT: shown, **_rounded(answer), **known} for shown, answer, known in rows)
                yield "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in whole)


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
    """Rows that end in a line feed; a writer that is told so would leave a carriage return inside a field without quotes."""
    text = io.StringIO()
    writer, found = csv.writer(text, lineterminator="\r\n"), []
    for row in rows:
        writer.writerow(row)
        found.append(text.getvalue().removesuffix("\r\n") + "\n")
        text.seek(0)
        text.truncate()
    return "".join(found)
