"""What a score is, and how scores come from sums over examples that add up over clients. Without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
Sums = Mapping[str, Array]


def number(points: float, unit: str) -> str:
    """Tenths of a percent point, or three digits of anything else; without the unit."""
    return f"{points:.1f}" if unit == "%" else f"{points:.3g}"


def text(points: float, unit: str) -> str:
    """The same with the unit."""
    return f"{number(points, unit)} {unit}".rstrip()


@dataclass(frozen=True)
class Metric:
    """A score.

    Attributes:
        name: its key in rows.
        title: its name in titles and tables.
        unit: "%" of a share of 1, which is shown in percent; else what stands behind the number, or nothing.
        better: which of two scores is the better one.
        baseline: the key in rows of what a constant answer scores on the same examples; empty where there is none.
        constant: that constant answer, as in "no better than …".
        model: whether that is no constant answer but another model, which answers as it does.
    """

    name: str
    title: str
    unit: str = "%"
    better: Literal["higher", "lower"] = "higher"
    baseline: str = ""
    constant: str = ""
    model: bool = False

    @property
    def answering(self) -> str:
        """What is no better than `constant` does no better than this."""
        return self.constant if self.model else f"always answering {self.constant}"

    @property
    def rival(self) -> str:
        """The same as the name of a row in a table."""
        return self.constant if self.model else f"always {self.constant}"

    def points(self, value: float) -> float:
        """A value on the scale on which it is shown: percent of a share."""
        return 100 * value if self.unit == "%" else value

    def shown(self, value: float) -> float:
        """A value as it is shown: in tenths of a percent point, else in three digits. Values that are shown alike are a tie."""
        return round(100 * value, 1) if self.unit == "%" else float(f"{value:.3g}")

    def number(self, value: float | None) -> str:
        """A value without its unit; "-" where there is none."""
        return "-" if value is None else number(self.points(value), self.unit)

    def text(self, value: float | None) -> str:
        """A value with its unit; "-" where there is none."""
        return "-" if value is None else text(self.points(value), self.unit)

    def ahead(self, one: float, other: float) -> bool:
        """Whether one value is better than another."""
        return one > other if self.better == "higher" else one < other

    def no_better(self, value: float, baseline: float | None) -> bool:
        """Whether a value is no better, as shown, than that of the constant answer."""
        return baseline is not None and not self.ahead(self.shown(value), self.shown(baseline))

    def as_json(self) -> dict[str, Any]:
        """For federation.json, so that a folder can be read without the task's code."""
        return {key: value for key, value in asdict(self).items() if key != "model" or value}


CLASSIFICATION = (  # of classifiers, and of folders that do not say: their versions knew nothing else
    Metric("accuracy", "accuracy", baseline="commonest_accuracy", constant="the commonest class"),
    Metric("macro_f1", "macro F1"),
)


class Scoring(Protocol):
    """How the models of one run are scored. Sums are arrays by name: those over the examples of several clients are those of each,
    added."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The first is the one that runs are compared by."""

    def zeros(self) -> dict[str, Array]:
        """The sums over no examples, which say names, shapes and dtypes."""

    def scores(self, sums: Sums) -> dict[str, float]:
        """Each metric, by name; nan where there are no examples for it."""

    def baseline(self, sums: Sums) -> float:
        """The first metric of the constant answer, or of the model that stands for it."""

    def count(self, sums: Sums) -> int:
        """How many examples were scored."""

    def undecided(self, sums: Sums) -> int:
        """For how many of them a model gave no finite numbers."""

    def by_domain(self, sums: Sums) -> dict[str, float]:
        """The first metric of each domain that has examples, in a run of several where sums tell them apart."""

    def arrays(self, sums: Sums) -> dict[str, Array]:
        """What sums say in detail, kept beside the row of a run's last round."""


EVAL_LOSS = Metric("eval_loss", "evaluation loss", unit="", better="lower")


class MeanLoss:
    """The mean loss by example, where no more is known. Sums, (1,) each: "count" of examples, "undecided" those without a finite
    loss, "losses"."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (EVAL_LOSS,)

    def of(self, loss: float, count: int) -> dict[str, Array]:
        """The sums of so many examples with this mean."""
        decided = bool(np.isfinite(loss))
        return {
            "count": np.array([count]),
            "undecided": np.array([0 if decided else count]),
            "losses": np.array([loss * count if decided else 0.0]),
        }

    def zeros(self) -> dict[str, Array]:
        return self.of(0.0, 0)

    def scores(self, sums: Sums) -> dict[str, float]:
        decided = self.count(sums) - self.undecided(sums)
        return {EVAL_LOSS.name: float(sums["losses"][0]) / decided if decided else float("nan")}

    def baseline(self, sums: Sums) -> float:
        return float("nan")

    def of_constant(self, constant: Array, data: Any, base: Any) -> dict[str, Array]:
        """There is no answer to be constant."""
        return {}

    def count(self, sums: Sums) -> int:
        return int(sums["count"][0])

    def undecided(self, sums: Sums) -> int:
        return int(sums["undecided"][0])

    def by_domain(self, sums: Sums) -> dict[str, float]:
        return {}

    def arrays(self, sums: Sums) -> dict[str, Array]:
        return {}


def total(scoring: Scoring, sums: Iterable[Sums]) -> dict[str, Array]:
    """All of them, added in this order."""
    added = scoring.zeros()
    for each in sums:
        for name, x in each.items():
            added[name] = added[name] + x
    return added


def fit(scoring: Scoring, sums: Any) -> bool:
    """Whether arrays that were received are sums of this scoring: counts are not negative, and all are finite."""
    wanted = scoring.zeros()
    if not isinstance(sums, Mapping) or set(sums) != set(wanted):
        return False
    return all(_is_like(wanted[name], x) for name, x in sums.items())


def _is_like(zero: Array, x: Any) -> bool:
    if not isinstance(x, np.ndarray) or x.dtype != zero.dtype or x.shape != zero.shape:
        return False
    return bool((x >= 0).all() if x.dtype.kind in "iu" else np.isfinite(x).all())
