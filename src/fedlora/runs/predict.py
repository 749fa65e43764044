"""Labels for new texts, from the model that the run scored: everybody's, or one client's; in a run of several data sets, among the
classes of the text's own one."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.config import Config, SourceConfig
from fedlora.errors import BadInput, some, unknown
from fedlora.models.load import Pretrained
from fedlora.runs.export import located, read_result, which_client
from fedlora.runs.prepare import has_own_models, load_pretrained, make_trainer, try_pretrained
from fedlora.runs.roster import Roster
from fedlora.training.batched import Trainer
from fedlora.training.encode import encode
from fedlora.training.score import ScoreJob
from fedlora.types import Model, Tensors

Say = Callable[[str], None]


class Format(Enum):
    """How answers are written."""

    TSV = "tsv"  # label, its probability, text; tabs, line ends and backslashes inside are escaped with a backslash
    CSV = "csv"  # a header; text, label, its probability, and that of every class
    JSON = "json"  # an object a line: text, label, probability, probabilities by class


@dataclass(frozen=True)
class Choice:
    """Which model of a run folder, not yet loaded.

    Attributes:
        task: the place of the texts' data set among the run's; None where it has one.
    """

    config: Config
    roster: Roster
    model: Model
    head: Tensors
    task: int | None
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> SourceConfig:
        """The data set that texts are of, and the column that holds them."""
        return self.config.data.sources[self.task or 0]

    @property
    def classes(self) -> slice:
        """Of the run's classes, those that can be the answer."""
        if self.task is None:
            return slice(0, len(self.roster.label_names))
        task = self.roster.domains[self.task]
        return slice(task.first, task.first + task.count)


@dataclass(frozen=True)
class Predictor:
    """A model that is loaded once, for as many texts as there are; `note` hears what a user should know."""

    choice: Choice
    pretrained: Pretrained
    trainer: Trainer
    limit: int
    note: Say

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes that can be the answer."""
        return self.choice.roster.label_names[self.choice.classes]

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Of every class for every text, (n, classes). BadInput where the model's answers are no numbers."""
        data = encode(self.pretrained.tokenizer, texts, np.zeros(len(texts), dtype=np.int64), self.limit)
        if data.cut:
            self.note(f"{data.cut:,} of {len(texts):,} texts are longer than {self.limit} tokens, and cut")
        if self.choice.task is not None:
            data = replace(data, domains=np.full(len(texts), self.choice.task, dtype=np.int64))
        (logits,) = self.trainer.logits([ScoreJob(self.choice.model, self.choice.head, data)])
        own = torch.from_numpy(logits[:, self.choice.classes])
        if not bool(own.isfinite().all()):
            raise BadInput("the model's answers are not finite: its training diverged, and a lower train.lr may help")
        found: NDArray[np.float32] = own.softmax(dim=1).numpy()
        return found


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
    task = _task(run, roster, domain)
    notes: tuple[str, ...] = ()
    if id is not None and domain is not None and domain not in roster.clients[id].domains:
        notes = (f"{roster.names[id]} has no training example of {domain}, and its model was not scored on it",)
    return Choice(located(config, run), roster, model, head, task, notes)


def load(choice: Choice, note: Say = lambda text: None, stage: Say = lambda text: None) -> Predictor:
    """Load a model; `stage` hears what is being done."""
    for text in choice.notes:
        note(text)
    config = choice.config
    stage(f"loading {config.model.source}")
    pretrained = load_pretrained(config, choice.roster)
    stage("trying the model")
    findings = try_pretrained(config, pretrained)
    trainer = make_trainer(config, pretrained, findings, choice.roster.domains)
    return Predictor(choice, pretrained, trainer, choice.roster.max_length or findings.limit, note)


def _task(run: Path, roster: Roster, domain: str | None) -> int | None:
    names = [task.name for task in roster.domains]
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
    run: Path, texts: Sequence[str], note: Say = lambda text: None, client: int | str | None = None, domain: str | None = None
) -> list[tuple[str, float]]:
    """The label of each text, and its probability; `choose` says by which model."""
    model = load(choose(run, client, domain), note)
    return [(model.label_names[p.argmax()], float(p.max())) for p in model.probabilities(texts)]


def answers(model: Predictor, batches: Iterable[Sequence[str]], form: Format) -> Iterator[str]:
    """What is written for batches of texts, a piece each."""
    if form is Format.CSV:
        yield _csv([["text", "label", "probability", *(f"p({name})" for name in model.label_names)]])
    for texts in batches:
        found = model.probabilities(texts)
        best = [(model.label_names[p.argmax()], p.max()) for p in found]
        rows = zip(texts, best, found, strict=True)
        match form:
            case Format.TSV:
                yield "".join(f"{_escaped(label)}\t{p:.3f}\t{_escaped(text)}\n" for text, (label, p), _ in rows)
            case Format.CSV:
                yield _csv([text, label, f"{p:.6f}", *(f"{q:.6f}" for q in all)] for text, (label, p), all in rows)
            case Format.JSON:
                yield "".join(
                    _json(text, label, p, dict(zip(model.label_names, all, strict=True))) for text, (label, p), all in rows
                )


def _escaped(text: str) -> str:
    return text.translate({ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"})


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _json(text: str, label: str, probability: float, all: dict[str, float]) -> str:
    by_class = {name: round(float(p), 6) for name, p in all.items()}
    row = {"text": text, "label": label, "probability": round(float(probability), 6), "probabilities": by_class}
    return json.dumps(row, ensure_ascii=False) + "\n"
