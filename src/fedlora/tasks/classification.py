"""What tasks with classes share, whatever is classified: losses, scores and answers.

Sums of a classifier's answers:

confusion   (C, C + 1) integers: how often each class (row) was taken for each (column); the last column counts the examples for
            which a model gives no finite numbers, which are never right
commonest   (1,) integers: the examples that would be right if the answer were always the commonest training class
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.config import SourceConfig
from fedlora.data import columns
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.encoded import Encoded
from fedlora.data.source import Part, Source
from fedlora.errors import BadInput
from fedlora.tasks.base import Answer, Answering, Running
from fedlora.tasks.metrics import CLASSIFICATION, Array, Metric, Sums

UNDECIDED = -1  # the class of an example for which a model gives no finite numbers


@dataclass(frozen=True)
class Classes:
    """Classification among the classes of a schema; an example of a domain competes among the classes of its own domain only."""

    schema: Schema

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return CLASSIFICATION

    @property
    def outputs(self) -> int:
        return len(self.schema.label_names)

    # ---- training ------------------------------------------------------------------------------------------------------

    def within(self, outputs: Tensor, domains: np.ndarray) -> Tensor:
        if not len(domains):
            return outputs
        own = torch.zeros(len(self.schema.domains), outputs.shape[1], dtype=torch.bool)
        for t in range(len(self.schema.domains)):
            own[t, self.schema.classes(t)] = True
        return outputs.masked_fill(~own[torch.from_numpy(domains)].to(outputs.device), -torch.inf)

    def losses(self, outputs: Tensor, data: Encoded) -> Tensor:
        # A class of another domain is at -inf: it weighs nothing.
        return cross_entropy(outputs, torch.from_numpy(data.targets).to(outputs.device), reduction="none")

    def weights(self, data: Encoded) -> np.ndarray:
        return np.ones(len(data))

    # ---- scores --------------------------------------------------------------------------------------------------------

    def zeros(self) -> dict[str, Array]:
        classes = len(self.schema.label_names)
        return {"confusion": np.zeros((classes, classes + 1), dtype=np.int64), "commonest": np.zeros(1, dtype=np.int64)}

    def sums(self, outputs: Array, data: Encoded) -> dict[str, Array]:
        return {"confusion": confusion(outputs, data.targets)}

    def further(self, data: Encoded, model: Running) -> dict[str, Array]:
        return {}

    def constant(self, data: Encoded, otherwise: Array | None = None) -> Array:
        said = np.zeros(max(1, len(self.schema.domains)), dtype=np.int64) if otherwise is None else otherwise.copy()
        for t in range(len(said)):
            mine = data.targets[data.domain_index == t]
            if len(mine):
                said[t] = np.bincount(mine).argmax()
        return said

    def of_constant(self, constant: Array, data: Encoded, base: Running) -> dict[str, Array]:
        return {"commonest": np.array([(data.targets == constant[data.domain_index]).sum()], dtype=np.int64)}

    def scores(self, sums: Sums) -> dict[str, float]:
        return {"accuracy": accuracy(sums), "macro_f1": macro_f1(sums)}

    def baseline(self, sums: Sums) -> float:
        return _share(int(sums["commonest"].sum()), self.count(sums))

    def count(self, sums: Sums) -> int:
        return int(sums["confusion"].sum())

    def undecided(self, sums: Sums) -> int:
        return int(sums["confusion"][:, -1].sum())

    def by_domain(self, sums: Sums) -> dict[str, float]:
        own = {domain.name: accuracy(sums, self.schema.classes(t)) for t, domain in enumerate(self.schema.domains)}
        return {name: share for name, share in own.items() if share == share}

    def arrays(self, sums: Sums) -> dict[str, Array]:
        return {"confusion": sums["confusion"][:, :-1].copy()}


def decided(outputs: Array) -> Array:
    """The class (n,) with the largest of outputs (n, C), or UNDECIDED where that is no finite number."""
    return np.where(np.isfinite(outputs.max(axis=1)), outputs.argmax(axis=1), UNDECIDED)


def confusion(outputs: Array, labels: Array) -> Array:
    """The sum of that name over these examples."""
    classes = outputs.shape[1]
    taken = decided(outputs) % (classes + 1)  # UNDECIDED is the last column
    return np.bincount(labels * (classes + 1) + taken, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def accuracy(sums: Sums, classes: slice = slice(None)) -> float:
    """The share of examples, of these classes alone, that were right; nan without examples."""
    taken = sums["confusion"][classes]
    return _share(int(np.trace(taken, offset=classes.start or 0)), int(taken.sum()))


def macro_f1(sums: Sums) -> float:
    """Mean over the classes that occur, among labels or answers, of 2 TP / (2 TP + FP + FN); nan without examples."""
    taken = sums["confusion"]
    hits, either = np.diag(taken), taken.sum(axis=1) + taken[:, :-1].sum(axis=0)
    return float((2 * hits[either > 0] / either[either > 0]).mean()) if taken.any() else float("nan")


def _share(right: int, of: int) -> float:
    return right / of if of else float("nan")


def read(
    source: Source,
    config: SourceConfig,
    schema: Schema | None,
    inputs: Callable[[Part], Sequence[Any]],
    things: str,
    shape: tuple[int, ...] = (),
) -> Dataset:
    """A data set whose targets are the classes in its column of labels. Labels become indices of the classes: text labels in sorted
    order, integer labels in order of size, or as the source names them.

    Args:
        inputs: of a part, what is classified.
        things: what these are called.

    Raises:
        BadInput: see `data.columns`; fewer than two classes; a label that `schema` does not have.
    """
    labels = columns.labels(source.train, config.label)
    if schema is None and len(set(labels)) < 2:
        raise BadInput(f"{source.train.where}: column '{config.label}' holds only one class, {labels[0]!r}; two are needed")
    integers = isinstance(labels[0], int)
    notes, names = source.notes, source.label_names if schema is None else schema.label_names
    if names is None:
        names = columns.class_names(labels)
        if integers and names != tuple(map(str, range(len(names)))):
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            notes = (*notes, f"integer labels {shown} are not 0 to {len(names) - 1}: classes are numbered in their order")

    def split(part: Part, values: columns.Labels) -> Split:
        encoded = columns.encode(part, config.label, values, names, named=source.label_names is not None)
        owners = columns.owners_of(part, config.column, needed=part is source.train)
        return Split(tuple(inputs(part)), encoded, owners)

    def scored(part: Part) -> Split:
        return split(part, columns.labels(part, config.label, integers))

    return Dataset(
        source.name,
        split(source.train, labels),
        scored(source.test) if source.test is not None else Split((), np.zeros(0, dtype=np.int64)),
        Schema(names, shape=shape),
        (*notes, *columns.alike(names)),
        validation=scored(source.validation) if source.validation is not None else None,
        things=things,
    )


def answers(inputs: Sequence[Any], model: Answering) -> list[Answer]:
    """The label of each input, its probability, and that of every class of its domain."""
    own = torch.from_numpy(model.outputs(inputs)[:, model.schema.classes(model.domain)])
    if not bool(own.isfinite().all()):
        raise BadInput("the model's answers are not finite: its training diverged, and a lower train.lr may help")
    names = model.schema.label_names[model.schema.classes(model.domain)]
    found = own.softmax(dim=1).numpy()
    return [
        {"label": names[p.argmax()], "probability": float(p.max()), "probabilities": dict(zip(names, map(float, p), strict=True))}
        for p in found
    ]
