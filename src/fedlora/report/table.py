"""A split of a data set as tables on the terminal."""

from collections.abc import Sequence

from fedlora.data.dataset import Dataset, Integers
from fedlora.data.partition import Parts, Spread, statistics

MOST_CLIENTS = 40  # longer tables are cut in the middle


def print_split(parts: Parts, dataset: Dataset, trained: Integers | None = None) -> None:
    """Every client with its number of examples and strata, then the statistics of the split.

    Args:
        trained: how many tokens of each training example are learned, (n,), where that is known.
    """
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for note in dataset.notes:
        console.print(f"note: {note}", markup=False)
    parted, kind = dataset.validation is not None, dataset.strata_kind
    sizes = [f"{len(part):,} {name}" for name, part in dataset.parts]
    total = f"{', '.join(sizes[:-1])} and {sizes[-1]} examples of {len(dataset.strata_names)} {dataset.strata_kind}"
    aside = f", {parts.held_out} of them held out" if parts.held_out else ""
    console.print(f"{dataset.name}: {total}, {parts.rule}, {len(parts.names)} clients{aside}\n", markup=False)
    table = Table("client", "most frequent", box=None, pad_edge=False)
    more = [*(["validation"] if parted else []), *([] if trained is None else ["tokens learned"])]
    for column in ("train", kind, "test", f"test {kind}", *more):
        table.add_column(column, justify="right")
    count = len(parts.names)
    shown = range(count) if count <= MOST_CLIENTS else [*range(MOST_CLIENTS // 2), *range(count - MOST_CLIENTS // 2, count)]
    for k in shown:
        if count > MOST_CLIENTS and k == count - MOST_CLIENTS // 2:
            table.add_row("...")
        own, test = dataset.train.strata[parts.train[k]], dataset.test.strata[parts.test[k]]
        if len(own):
            often = np.bincount(own)
            top = f"{dataset.strata_names[often.argmax()]} ({often.max() / len(own):.0%})"
        else:
            top = "-"
        numbers = [len(own), len(np.unique(own)), len(test), len(np.unique(test))]
        numbers += [len(parts.validation[k])] if parted else []
        numbers += [] if trained is None else [int(trained[parts.train[k]].sum())]
        name = f"{parts.names[k]} (held out)" if k >= count - parts.held_out else parts.names[k]
        table.add_row(name, top, *(f"{number:,}" for number in numbers))
    console.print(table)
    spread = statistics(parts, dataset)
    summary = Table("over clients", box=None, pad_edge=False)
    for column in ("train", "test", *(["validation"] if parted else [])):
        summary.add_column(column, justify="right")
    rows = {
        "most examples": "max_examples",
        "fewest examples": "min_examples",
        f"most {kind}": "max_classes",
        f"fewest {kind}": "min_classes",
    }
    for title, field in rows.items():
        summary.add_row(title, *(f"{_get(part, field):,}" for part in (spread.train, spread.test, spread.validation) if part))
    console.print()
    console.print(summary)


def print_tokens(shown: str, tokens: Integers, trained: Integers, limit: int, notes: Sequence[str]) -> None:
    """How an example looks to a model, and how long they are.

    Args:
        shown: one of them, with what is learned between « and ».
        tokens: of each training example before it is cut, (n,).
        trained: how many of them are learned, (n,).
        limit: where they are cut.
    """
    import numpy as np
    from rich.console import Console

    console = Console(highlight=False)
    console.print("\nthe first training example, what is learned between « and »:", markup=False)
    console.print(_middle_out(shown), markup=False, soft_wrap=True)
    median, most, longest = (int(x) for x in np.quantile(tokens, (0.5, 0.95, 1), method="higher"))
    over = int((tokens > limit).sum())
    console.print(
        f"\ntokens of a training example: median {median:,}, 95 % have {most:,} or fewer, the longest {longest:,}; "
        f"{over:,} of {len(tokens):,} are longer than {limit:,}, where they are cut; "
        f"{int(trained.sum()):,} tokens are learned in all",
        markup=False,
        soft_wrap=True,
    )
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _middle_out(text: str, most: int = 1600) -> str:
    """A long text without its middle."""
    return text if len(text) <= most else f"{text[: most // 2]}\n…\n{text[-most // 2 :]}"


def _get(spread: Spread, field: str) -> int:
    value: int = getattr(spread, field)
    return value
