"""The answer that the first screen gives: for each place, who has the best score and who gets near to that with fewest bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.report.contenders import Contender, Spread, by_place
from fedlora.report.units import least, worth
from fedlora.tasks.metrics import Metric

NEAR = 0.95  # the share of the best score that counts as getting near to it; the best is this share of one where lower is better


@dataclass(frozen=True)
class Answer:
    """The answer in one place.

    Attributes:
        contenders: those that are ranked, the best first.
        target: near to the best score, in points.
        reached: contenders that reach the target in their mean over seeds, fewest uploaded bytes first, with those bytes.
        baseline: the score of the constant answer, in points; None where the runs do not say.
    """

    where: str
    contenders: tuple[Contender, ...]
    target: float
    reached: tuple[tuple[Contender, float], ...]
    baseline: float | None

    @property
    def best(self) -> Contender:
        return self.contenders[0]

    @property
    def leaders(self) -> tuple[Contender, ...]:
        """The best: more than one where their scores are shown alike."""
        return tuple(contender for contender in self.contenders if rank(contender) == rank(self.best))

    @property
    def cheapest(self) -> tuple[Contender, ...]:
        """Those that reach the target with fewest bytes: more than one where these are equal in three digits."""
        return tuple(contender for contender, cost in self.reached if size(cost) == size(self.reached[0][1]))

    @property
    def metric(self) -> Metric:
        return self.best.metric

    @property
    def score(self) -> Spread:
        return scored(self.best)

    @property
    def goal(self) -> str:
        """The target with its unit."""
        return f"{self.target:g} {self.metric.unit}".rstrip()

    @property
    def useless(self) -> bool:
        """Whether nothing does better than the constant answer."""
        scale = self.metric.points(1.0)
        return self.metric.no_better(self.score.mean / scale, None if self.baseline is None else self.baseline / scale)

    @property
    def noise(self) -> float:
        """Half the 95 % interval, in percent points, that the size of the test set alone gives to one run's share of right answers;
        0 of other scores."""
        p, n = self.score.mean / 100, sum(int(client.get("num_test") or 0) for client in self.best.runs[0].clients)
        return 100 * 1.96 * math.sqrt(p * (1 - p) / n) if n and self.metric.unit == "%" and 0 < p < 1 else 0.0


def answers(contenders: Sequence[Contender]) -> list[Answer]:
    """One for each place in which anything was scored. What has diverged is not ranked."""
    out = []
    for where, here in by_place(contenders).items():
        ranked = sorted((contender for contender in here if contender.ranked), key=lambda contender: -rank(contender))
        if ranked:
            metric = ranked[0].metric
            target = least(metric, scored(ranked[0]).mean, NEAR)
            costs = ((contender, bytes_to(contender, target)) for contender in ranked)
            reached = sorted(((contender, cost) for contender, cost in costs if cost is not None), key=lambda pair: pair[1])
            known = [x.mean for contender in ranked if (x := contender.final(metric.baseline))]
            baseline = max(known, key=lambda points: worth(metric, points), default=None)
            out.append(Answer(where, tuple(ranked), target, tuple(reached), baseline))
    return out


def rank(contender: Contender) -> float:
    """The larger, the better; equal for scores that are shown alike."""
    return worth(contender.metric, scored(contender).mean)


def bytes_to(contender: Contender, target: float) -> float | None:
    """What all clients have uploaded when the mean score over seeds first reaches `target`, in points; None if it never does."""
    curve = contender.curve()
    there = (curve.mean >= target if contender.metric.better == "higher" else curve.mean <= target).nonzero()[0]
    return float(curve.megabytes[there[0]] * 1e6) if len(there) else None


def scored(contender: Contender) -> Spread:
    """The final score of a contender that is known to have one."""
    found = contender.final()
    assert found is not None
    return found


def size(count: float) -> str:
    """Bytes with a unit, three digits."""
    return _short(count, (" B", " kB", " MB", " GB", " TB"))


def params(count: float) -> str:
    """A number of parameters, three digits."""
    return _short(count, ("", " k", " M", " G", " T"))


def _short(count: float, units: Sequence[str]) -> str:
    """Three digits of a number and the first unit, each a thousand of the one before, in which it has no more."""
    for unit in units[:-1]:
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g}{units[-1]}"
