"""Data that is at hand has a place in a comparison's folder, and other data another."""

from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from fedlora.comparison.at_hand import keep
from fedlora.data.given import GIVEN, Data

ROWS = [{"text": f"text {i}", "label": "xy"[i % 2]} for i in range(4)]


def place(folder: Path, data: Data) -> Path:
    ((tables),) = keep(folder, None, data, {"data": {"label": ["label", "text"]}})
    return Path(tables["data"]["source"])


def test_other_data_has_another_place_and_the_same_its_own(tmp_path: Path) -> None:
    one, other = Data(ROWS), Data([*ROWS, {"text": "more", "label": "x"}])
    first = place(tmp_path, one)
    assert first == tmp_path / GIVEN / "data"  # where earlier versions had it, so that their runs have the same hashes
    second = place(tmp_path, other)
    assert second not in (first, place(tmp_path, Data(ROWS, name="another")))
    assert second.name == "data" and parquet.read_table(second / "train.parquet").num_rows == 5
    assert (place(tmp_path, one), place(tmp_path, other)) == (first, second)
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    parquet.write_table(pa.table({**columns, "unused": [1] * 4}), first / "train.parquet")  # as an earlier version kept it
    assert place(tmp_path, one) == first
