"""Scores of a round: of the one model on a whole part of the data, or, where clients end with models of their own, of each client's
on its own share of it, pooled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from fedlora.config import HeadMode
from fedlora.data.dataset import Integers
from fedlora.runs.context import RunContext
from fedlora.runs.prepare import has_own_models
from fedlora.server.loop import Server
from fedlora.training.encode import Encoded
from fedlora.training.metrics import UNDECIDED, accuracy, confusion, decided, macro_f1
from fedlora.training.score import ScoreJob
from fedlora.transports.inprocess import InProcess
from fedlora.types import Client, own_model


@dataclass(frozen=True)
class Answers:
    """The predicted class of each of these rows of a part; `client` is whose model said so, None for everybody's."""

    client: Client | None
    rows: Integers
    predicted: Integers


@record_function("evaluate")
def evaluate(context: RunContext, server: Server, transport: InProcess) -> tuple[dict[str, Any], Tensor]:
    """Scores on the test part, and on the validation part where there is one; and how often each class (row) was taken for each
    (column) on the test part, (C, C)."""
    test, tasks = context.test, context.dataset.domains
    found = list(_answers(context, server, transport, test, context.parts.test))
    rows, predicted = _joined(found)
    labels = test.labels[rows]
    commonest = np.concatenate([_commonest(context, each) for each in found]) if found else rows
    scores: dict[str, Any] = {
        "accuracy": accuracy(predicted, labels),
        "macro_f1": macro_f1(predicted, labels),
        "commonest_accuracy": accuracy(commonest, labels),
    }
    if (predicted == UNDECIDED).any():
        scores["undecided"] = int((predicted == UNDECIDED).sum())
    if has_own_models(context.config):
        scores["client_accuracy"] = {str(e.client.id): accuracy(e.predicted, test.labels[e.rows]) for e in found if e.client}
    if tasks:
        own, right = test.domains[rows], predicted == labels
        scores["domain_accuracy"] = {task.name: float(right[own == i].mean()) for i, task in enumerate(tasks) if (own == i).any()}
    if context.validation is not None:
        where, said = _joined(list(_answers(context, server, transport, context.validation, context.parts.validation)))
        held = context.validation.labels[where]
        scores |= {"validation_accuracy": accuracy(said, held), "validation_macro_f1": macro_f1(said, held)}
    return scores, torch.from_numpy(confusion(predicted, labels, len(context.dataset.label_names)))


def _answers(
    context: RunContext, server: Server, transport: InProcess, part: Encoded, owned: Sequence[Integers]
) -> Iterator[Answers]:
    """What the model, or each client's own, answers on a part."""
    if not has_own_models(context.config):
        (logits,) = context.trainer.logits([ScoreJob(context.method.deploy(server.state), server.head, part)])
        yield Answers(None, np.arange(len(part)), decided(logits))
        return
    scored = [client for client in context.setup.clients if len(owned[client.id])]

    def ask(client: Client) -> ScoreJob:
        kept = transport.kept_by(client)
        if client.id in server.accepted:
            model = own_model(context.method, server.state, kept.held, client, server.round + 1)
        else:
            model = context.method.deploy(server.state)
        head = kept.head if context.config.model.head is HeadMode.PERSONAL else server.head
        return ScoreJob(model, head, part.take(owned[client.id]))

    for client, logits in zip(scored, context.trainer.logits(map(ask, scored)), strict=True):
        yield Answers(client, owned[client.id], decided(logits))


def _joined(found: Sequence[Answers]) -> tuple[Integers, Integers]:
    """All rows and what was predicted for them; a row stands there once for each model that was asked."""
    nothing = np.zeros(0, dtype=np.int64)
    return np.concatenate([nothing, *(e.rows for e in found)]), np.concatenate([nothing, *(e.predicted for e in found)])


def _commonest(context: RunContext, answers: Answers) -> Integers:
    """What one would answer on these test rows who knows only the commonest training class: of everybody, or of the client whose
    model is scored; in a run of several tasks, of the row's task."""
    train, tasks = context.dataset.train, context.dataset.domains
    own = slice(None) if answers.client is None else context.parts.train[answers.client.id]
    said = np.zeros(len(answers.rows), dtype=np.int64)
    for t in range(max(1, len(tasks))):
        here = context.test.domains[answers.rows] == t if tasks else slice(None)
        mine = train.labels[own][train.domains[own] == t] if tasks else train.labels[own]
        if not len(mine):  # nothing of its own to go by
            mine = train.labels[train.domains == t] if tasks else train.labels
        said[here] = np.bincount(mine).argmax()
    return said
