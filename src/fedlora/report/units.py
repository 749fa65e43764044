"""Scores as pages show them, in points: percent of a share of 1, or a metric's own unit."""

import math

from fedlora.tasks.metrics import Metric

LOSS = Metric("loss", "training loss", unit="", better="lower")  # of what has no score


def signed(points: float, unit: str) -> str:
    """A difference, without the unit."""
    return (f"{points:+.1f}" if unit == "%" else f"{points:+.3g}").replace("-", "−")


def headed(what: str, unit: str) -> str:
    """A heading or an axis: "accuracy, %"."""
    return f"{what}, {unit}" if unit else what


def within(unit: str) -> str:
    """What a caption adds: " in percent"."""
    return f" in {'percent' if unit == '%' else unit}" if unit else ""


def worth(metric: Metric, points: float) -> float:
    """The larger, the better; equal for scores that are shown alike."""
    shown = metric.shown(points / metric.points(1.0))
    return shown if metric.better == "higher" else -shown


def least(metric: Metric, points: float, near: float) -> float:
    """The score that is as near to this one as a share of it, `near`, says, rounded to the worse side: to whole percent points
    where higher is better and to tenths where lower is, or to three digits of anything else."""
    shares = near * points, points / near
    worse, away = (min(shares), math.floor) if metric.better == "higher" else (max(shares), math.ceil)
    if metric.unit == "%":
        return float(away(worse)) if metric.better == "higher" else away(10 * worse) / 10
    step = 10.0 ** (math.floor(math.log10(abs(worse))) - 2) if worse else 1.0
    return float(f"{away(worse / step) * step:.3g}")
