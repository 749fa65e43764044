"""The answer that the first screen gives: for each place, who is most accurate and who gets near to that with fewest bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.report.contenders import Contender, Spread, by_place
from fedlora.tasks.metrics import CLASSIFICATION

NEAR = 0.95  # the share of the best accuracy that counts as getting near to it


@dataclass(frozen=True)
class Answer:
    """The answer in one place.

    Attributes:
        contenders: those that are ranked, the most accurate first.
        target: NEAR of the best accuracy, rounded down to whole percent points.
        reached: contenders that reach the target in their mean over seeds, fewest uploaded bytes first, with those bytes.
        commonest: accuracy in percent of always answering the commonest training class; None where the runs do not say.
    """

    where: str
    contenders: tuple[Contender, ...]
    target: int
    reached: tuple[tuple[Contender, float], ...]
    commonest: float | None

    @property
    def best(self) -> Contender:
        return self.contenders[0]

    @property
    def leaders(self) -> tuple[Contender, ...]:
        """The most accurate: more than one where they are equal to the tenth of a point."""
        return tuple(contender for contender in self.contenders if _tenths(contender) == _tenths(self.best))

    @property
    def cheapest(self) -> tuple[Contender, ...]:
        """Those that reach the target with fewest bytes: more than one where these are equal in three digits."""
        return tuple(contender for contender, cost in self.reached if size(cost) == size(self.reached[0][1]))

    @property
    def accuracy(self) -> Spread:
        return scored(self.best)

    @property
    def useless(self) -> bool:
        """Whether nothing does better than always answering the commonest training class."""
        return CLASSIFICATION[0].no_better(self.accuracy.mean / 100, None if self.commonest is None else self.commonest / 100)

    @property
    def noise(self) -> float:
        """Half the 95 % interval, in percent points, that the size of the test set alone gives to one run's accuracy."""
        p, n = self.accuracy.mean / 100, sum(int(client.get("num_test") or 0) for client in self.best.runs[0].clients)
        return 100 * 1.96 * math.sqrt(p * (1 - p) / n) if n else 0.0


def answers(contenders: Sequence[Contender]) -> list[Answer]:
    """One for each place in which anything was scored. What has diverged is not ranked."""
    out = []
    for where, here in by_place(contenders).items():
        ranked = sorted((contender for contender in here if contender.ranked), key=lambda contender: -_tenths(contender))
        if ranked:
            target = math.floor(NEAR * scored(ranked[0]).mean)
            costs = ((contender, bytes_to(contender, target)) for contender in ranked)
            reached = sorted(((contender, cost) for contender, cost in costs if cost is not None), key=lambda pair: pair[1])
            commonest = [x.mean for contender in ranked if (x := contender.final("commonest_accuracy"))]
            out.append(Answer(where, tuple(ranked), target, tuple(reached), max(commonest, default=None)))
    return out


def _tenths(contender: Contender) -> float:
    return CLASSIFICATION[0].shown(scored(contender).mean / 100)


def bytes_to(contender: Contender, target: float) -> float | None:
    """What all clients have uploaded when the mean accuracy over seeds first reaches `target` percent; None if it never does."""
    curve = contender.curve()
    there = (curve.mean >= target).nonzero()[0]
    return float(curve.megabytes[there[0]] * 1e6) if len(there) else None


def scored(contender: Contender) -> Spread:
    """The final accuracy of a contender that is known to have one."""
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
