"""A split of a data set as tables on the terminal."""

from fedlora.data.dataset import Dataset
from fedlora.data.partition import Parts, Spread, statistics

MOST_CLIENTS = 40  # longer tables are cut in the middle


def print_split(parts: Parts, dataset: Dataset) -> None:
    """Every client with its number of examples and strata, then the statistics of the split."""
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
    for column in ("train", kind, "test", f"test {kind}", *(["validation"] if parted else [])):
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


def _get(spread: Spread, field: str) -> int:
    value: int = getattr(spread, field)
    return value
