"""What losses say of a run, by rules that the console, the page and the tables share."""

import math
from collections.abc import Sequence
from statistics import fmean, variance

FALL = 0.02  # of the training loss: a fall beyond it is one that goes on


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
