"""What scores say of a run, by rules that the console, the page and the tables share. Scores are shares of 1."""

import math
from collections.abc import Sequence
from statistics import fmean, variance

BASELINE = "always the commonest class"  # what it is called in tables
FALL = 0.02  # of the training loss: a fall beyond it is one that goes on


def shown(score: float) -> float:
    """A score in percent as it is shown, in tenths of a point. Scores that are shown alike are a tie."""
    return round(100 * score, 1)


def no_better(accuracy: float, commonest: float | None) -> bool:
    """Whether an accuracy is no higher, as shown, than that of always answering the commonest training class."""
    return commonest is not None and shown(accuracy) <= shown(commonest)


def still_falling(losses: Sequence[float | None]) -> bool:
    """Whether the training loss, a value a round, fell until the end: over the last quarter of the rounds its mean is more than
    `FALL` below that over the quarter before, and by more than two standard errors of that difference, for the losses of different
    clients differ. Never of fewer than two rounds, or where a loss of theirs is unknown."""
    width = math.ceil(len(losses) / 4)
    if len(losses) < 2 * width or width == 0:
        return False
    known = [loss for loss in losses[-2 * width :] if loss is not None and math.isfinite(loss)]
    if len(known) < 2 * width:
        return False
    before, after = known[:width], known[width:]
    fall = fmean(before) - fmean(after)
    error = math.sqrt((variance(before) + variance(after)) / width) if width > 1 else 0.0
    return fall > FALL * fmean(before) and fall > 2 * error
