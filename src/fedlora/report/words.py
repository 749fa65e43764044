"""What pages call the scores of a run. Accuracy has words of its own; of every other metric they say its title and direction."""

from collections.abc import Sequence

from fedlora.tasks.metrics import CLASSIFICATION, Metric, text

ACCURACY = CLASSIFICATION[0].name


def capital(words: str) -> str:
    """The same with a capital letter at its beginning."""
    return words[:1].upper() + words[1:]


def titled(metric: Metric) -> str:
    """ "mean squared error (lower is better)"; that higher is better goes without saying."""
    return f"{metric.title} (lower is better)" if metric.better == "lower" else metric.title


def by(metric: Metric) -> str:
    """What follows a score that stands alone; a percentage that is not said to be anything else is an accuracy."""
    return "" if metric.name == ACCURACY else f" in {titled(metric)}"


def best(metric: Metric, at: str = "") -> str:
    """ "Most accurate", or "Best by …", with a place."""
    return f"Most accurate{at}" if metric.name == ACCURACY else f"Best{at} by {metric.title} ({metric.better} is better)"


def equal(metric: Metric, at: str = "") -> str:
    """What is said of contenders whose scores are shown alike."""
    return f"Equally accurate{at}" if metric.name == ACCURACY else f"Equally good{at} by {titled(metric)}"


def useless(metric: Metric, at: str, baseline: float, names: str, score: str) -> str:
    """That no method does better than the constant answer; of its score in points, and of the best with theirs as text."""
    if metric.name == ACCURACY:
        told = f"{of_constant(metric, baseline)}, and the most accurate, {names}, in {score}"
    else:
        told = f"{of_constant(metric, baseline)}, and the best, {names}, {score}"
    return f"No method does better{at} than {metric.constant}: {told}."


def of_constant(metric: Metric, baseline: float) -> str:
    """How well one does who always answers the same, or the model that stands for that."""
    said = text(baseline, metric.unit)
    if metric.model:
        return f"{metric.constant} has {said}{by(metric)}"
    return f"always answering it is right in {said}" if metric.name == ACCURACY else f"always answering it has {said}{by(metric)}"


def no_better(metric: Metric) -> str:
    """The same for a table of results, without numbers."""
    constant = "the commonest training class" if metric.name == ACCURACY else metric.constant
    return f"No method does better than {constant if metric.model else f'always answering {constant}'}."


def worst_first(metric: Metric) -> str:
    return "least accurate first" if metric.name == ACCURACY else "worst first"


def further(metrics: Sequence[Metric]) -> dict[str, tuple[str, Metric]]:
    """The scores of a run beside that of its test set: key of a row -> title, and the metric that it is a value of."""
    first = metrics[0]
    return {metric.name: (metric.title, metric) for metric in metrics[1:]} | {
        f"validation_{first.name}": (f"validation {first.title}", first),
        f"held_out_{first.name}": (f"{first.title} on clients that never trained", first),
    }


def one(kind: str) -> str:
    """A single one of what strata are called in the plural: "class" of "classes", "value of 'team'" of "values of 'team'"."""
    first, space, rest = kind.partition(" ")
    return f"{first.removesuffix('es' if first.endswith('sses') else 's')}{space}{rest}"
