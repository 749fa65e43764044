"""Data sets from the Hugging Face Hub, through the optional package `datasets`."""

from typing import Any

from fedlora.data.formats import one_line
from fedlora.data.source import Part, Source
from fedlora.errors import BadInput

# Older data sets are scripts, which `datasets` 4 does not run; the Hub keeps every public one as parquet on this branch.
PARQUET_BRANCH = "refs/convert/parquet"


def from_hub(name: str, label: str, configuration: str | None = None) -> Source:
    """The splits train and, where there are such, test and validation of a data set "org/name".

    Args:
        label: the column whose names it may know.
        configuration: which of several that it has.

    Raises:
        BadInput: `datasets` is not installed, the Hub cannot be reached, or it has no such data set.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadInput(f"{name}: the Hugging Face Hub needs the package datasets: pip install datasets") from error
    asked = (name,) if configuration is None else (name, configuration)
    try:
        try:
            splits = load_dataset(*asked)
        except RuntimeError:  # "Dataset scripts are no longer supported"
            splits = load_dataset(*asked, revision=PARQUET_BRANCH)
    except Exception as error:  # its errors for offline, unknown, gated and several configurations have no common base
        raise BadInput(f"{name}: cannot be loaded from the Hugging Face Hub: {one_line(error)}") from error
    if "train" not in splits:
        raise BadInput(f"{name}: no split train on the Hugging Face Hub; it has {', '.join(splits)}")
    names = getattr(splits["train"].features.get(label), "names", None)
    return Source(
        name,
        _part(name, "train", splits),
        _part(name, "test", splits) if "test" in splits else None,
        tuple(names) if names else None,
        validation=_part(name, "validation", splits) if "validation" in splits else None,
    )


def _part(name: str, split: str, splits: Any) -> Part:
    return Part(f"{name} ({split})", splits[split].with_format("arrow")[:])
