"""Text regression: a number for each text, such as a rating.

Training is on standardised targets: an output o of the model stands for the number mean + spread * o, where mean and spread (the
standard deviation) are those of the training part, each domain's its own. So the loss, the mean of (o - (y - mean) / spread)², is
near 1 at the start whatever the unit, one learning rate serves ratings and prices, and a head that stays as it was drawn has not
far to reach. They are not folded into an exported head, for a decoder's has no bias: the model card and fedlora.json have them.

Scores are in the unit of the targets. Sums over examples, by domain, (domains,), with z the standardised number and o the output:

count, undecided          integers: all examples, and those for which a model gives no finite number; its answer then counts as the
                          mean of the training part
errors, distances         of (p - y)² and |p - y|, y and p being the numbers that z and o stand for
said, given, said_squared, given_squared, both      of o, z, o², z², o z, for the correlation, which is the same in either unit
constant                  of (c - y)², where c is the constant answer, the mean of the training examples
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.config import ModelConfig, SourceConfig
from fedlora.data import columns
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.encoded import Encoded
from fedlora.data.source import Part, Source
from fedlora.data.strata import bins
from fedlora.errors import BadInput
from fedlora.models.load import Given, Pretrained, load
from fedlora.tasks.base import Answer, Answering, Card, Result, Running, Task
from fedlora.tasks.metrics import Array, Metric, Sums
from fedlora.tasks.texts import TextTask, fields, how_to_use, on_padding

COUNTS = ("count", "undecided")
MOMENTS = ("said", "given", "said_squared", "given_squared", "both")
TOTALS = ("errors", "distances", *MOMENTS, "constant")
METRICS = (
    Metric("mse", "MSE", unit="", better="lower", baseline="constant_mse", constant="the training mean"),
    Metric("mae", "MAE", unit="", better="lower"),
    Metric("pearson", "Pearson's r", unit=""),
)


@dataclass(frozen=True)
class Numbers:
    """Regression of numbers with the scales of a schema."""

    schema: Schema

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return METRICS

    @property
    def outputs(self) -> int:
        return 1

    @cached_property
    def _scales(self) -> NDArray[np.float64]:
        """Mean and spread by domain, (domains, 2)."""
        return np.array(self.schema.scales, dtype=np.float64)

    # ---- training ------------------------------------------------------------------------------------------------------

    def within(self, outputs: Tensor, domains: np.ndarray) -> Tensor:
        return outputs

    def losses(self, outputs: Tensor, data: Encoded) -> Tensor:
        return (outputs.squeeze(1) - torch.from_numpy(self._standardised(data)).to(outputs)).square()

    def weights(self, data: Encoded) -> np.ndarray:
        return np.ones(len(data))

    def _standardised(self, data: Encoded) -> NDArray[np.float64]:
        mean, spread = self._scales[data.domain_index].T
        found: NDArray[np.float64] = (data.targets - mean) / spread
        return found

    # ---- scores --------------------------------------------------------------------------------------------------------

    def zeros(self) -> dict[str, Array]:
        count = len(self.schema.scales)
        return {name: np.zeros(count, dtype=np.int64) for name in COUNTS} | {name: np.zeros(count) for name in TOTALS}

    def sums(self, outputs: Array, data: Encoded) -> dict[str, Array]:
        decided = np.isfinite(outputs[:, 0])
        o, z = np.where(decided, outputs[:, 0], 0.0).astype(np.float64), self._standardised(data)
        off = (o - z) * self._scales[data.domain_index, 1]
        each = {"errors": off**2, "distances": abs(off)}
        each |= {"said": o, "given": z, "said_squared": o**2, "given_squared": z**2, "both": o * z}
        counts = {"count": np.ones_like(decided, dtype=np.int64), "undecided": (~decided).astype(np.int64)}
        return {name: self._by_domain(x, data) for name, x in {**counts, **each}.items()}

    def further(self, data: Encoded, model: Running) -> dict[str, Array]:
        return {}

    def constant(self, data: Encoded, otherwise: Array | None = None) -> Array:
        said = self._scales[:, 0].copy() if otherwise is None else otherwise.copy()
        for t in range(len(said)):
            mine = data.targets[data.domain_index == t]
            if len(mine):
                said[t] = mine.mean()
        return said

    def of_constant(self, constant: Array, data: Encoded, base: Running) -> dict[str, Array]:
        return {"constant": self._by_domain((constant[data.domain_index] - data.targets) ** 2, data)}

    def _by_domain(self, values: Array, data: Encoded) -> Array:
        """The sum of values (n,) in each domain."""
        found = np.zeros(len(self.schema.scales), dtype=values.dtype)
        np.add.at(found, data.domain_index, values)
        return found

    def scores(self, sums: Sums) -> dict[str, float]:
        count = self.count(sums)
        return {"mse": _mean(sums["errors"], count), "mae": _mean(sums["distances"], count), "pearson": pearson(sums)}

    def baseline(self, sums: Sums) -> float:
        return _mean(sums["constant"], self.count(sums))

    def count(self, sums: Sums) -> int:
        return int(sums["count"].sum())

    def undecided(self, sums: Sums) -> int:
        return int(sums["undecided"].sum())

    def by_domain(self, sums: Sums) -> dict[str, float]:
        each = enumerate(self.schema.domains)
        return {domain.name: _mean(sums["errors"][t], sums["count"][t]) for t, domain in each if sums["count"][t]}

    def arrays(self, sums: Sums) -> dict[str, Array]:
        return {}


def pearson(sums: Sums) -> float:
    """The correlation of what was said and what was given, of several domains in the spreads of each; nan where one of both does
    not vary."""
    n, (said, given, said2, given2, both) = int(sums["count"].sum()), (float(sums[name].sum()) for name in MOMENTS)
    spread = (n * said2 - said**2) * (n * given2 - given**2)
    varies = all(n * square - x**2 > 1e-12 * n * square for square, x in ((said2, said), (given2, given)))
    return float((n * both - said * given) / np.sqrt(spread)) if varies else float("nan")


def _mean(total: Array, count: int) -> float:
    return float(total.sum()) / count if count else float("nan")


@dataclass(frozen=True)
class TextRegression(TextTask):
    """Texts with numbers, by a pre-trained encoder or decoder with a head of one output."""

    TITLE: ClassVar[str] = "text regression"
    LACKS: ClassVar[frozenset[str]] = frozenset({"classes"})

    def read(self, source: Source, config: SourceConfig, schema: Schema | None = None) -> Dataset:
        known = columns.numbers(source.train, config.label)
        if schema is None and not known.std() > 0:
            raise BadInput(f"{source.train.where}: column '{config.label}' holds only one number, {known[0]:g}; two are needed")

        def split(part: Part, values: NDArray[np.float64]) -> Split:
            owners = columns.owners_of(part, config.column, needed=part is source.train)
            return Split(columns.texts(part, config.text), values, owners, strata=bins(values, known)[0])

        def scored(part: Part | None) -> Split | None:
            return None if part is None else split(part, columns.numbers(part, config.label))

        return Dataset(
            source.name,
            split(source.train, known),
            scored(source.test) or Split((), np.zeros(0)),
            Schema(scales=((float(known.mean()), float(known.std())),)) if schema is None else schema,
            source.notes,
            validation=scored(source.validation),
            strata_names=bins((), known)[1],
            strata_kind="ranges",
        )

    def load(
        self,
        config: ModelConfig,
        schema: Schema,
        seed: int,
        given: Given | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pretrained:
        return load(config, seed, given, num_labels=1, problem_type="regression")

    def bind(self, schema: Schema, pretrained: Pretrained | None = None) -> Numbers:
        return Numbers(schema)

    def answers(self, inputs: Sequence[Any], model: Answering) -> list[Answer]:
        outputs = model.outputs(inputs)
        if not np.isfinite(outputs).all():
            raise BadInput("the model's answers are not finite: its training diverged, and a lower train.lr may help")
        mean, spread = model.schema.scales[model.domain or 0]
        return [{"number": mean + spread * float(o)} for o in outputs[:, 0]]

    def card(self, result: Result) -> Card:
        scales = dict(zip([domain.name for domain in result.schema.domains], result.schema.scales, strict=False))
        (first, *others), which = result.schema.scales, ""
        if others:
            which = f"{scales!r}[{next(iter(scales))!r}]  # of the text's own data set"
        last = [f"mean, spread = {which or f'{first[0]!r}, {first[1]!r}'}", "print((mean + spread * logits[:, 0]).tolist())"]
        return Card(
            pipeline="text-classification",
            what="A model that gives a number for a text",
            of="on the test texts",
            facts=(("longest text", f"{result.limit} tokens"),),
            code=[*how_to_use(result, "SequenceClassification", "num_labels=1", last[0]), last[1]],
            after=f"An output is in units of the training data: their mean and spread make a number of it, as above. "
            f"{on_padding(result)}",
            fields={"num_labels": 1, "scales": result.schema.scales, **fields(result)},
        )


TASK: type[Task] = TextRegression
