"""Data that is given in Python: what it is taken for, what of it is kept, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny import TASK

from fedlora.config import DataConfig
from fedlora.data.given import GIVEN, KEPT, RUN, Data, given, same, table, write
from fedlora.data.load import load
from fedlora.data.partition import split
from fedlora.errors import BadInput
from fedlora.tasks import columns

ROWS = [{"text": f"text {i}", "label": "xyz"[i % 3]} for i in range(6)]
COLUMNS = {"text": [row["text"] for row in ROWS], "label": [row["label"] for row in ROWS]}


class Named:
    """A `datasets.Dataset` with names of its integer labels."""

    def __init__(self, labels: list[int], names: list[str]) -> None:
        self.table = pa.table({"text": [f"t{i}" for i in range(len(labels))], "label": labels})
        self.features = {"text": object(), "label": type("ClassLabel", (), {"names": names})}

    def with_format(self, kind: str) -> Any:
        return _Sliced(self.table)


class _Sliced:
    def __init__(self, table: Any) -> None:
        self.table = table

    def __getitem__(self, where: slice) -> Any:
        return self.table


class Streamed(Named):
    """One that is iterable: it has no table."""

    def with_format(self, kind: str) -> Any:
        return _Sliced(iter(()))


class Frame:
    """A data frame: columns by a list of names, and Arrow's interface, which a column of objects does not have."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns, self.values = list(columns), columns

    def __getitem__(self, names: list[str]) -> "Frame":
        return Frame({name: self.values[name] for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __arrow_c_stream__(self, schema: object = None) -> object:
        return pa.table(self.values).__arrow_c_stream__(schema)


def kept(data: Any, place: Path, task: str = "text_classification", **keys: Any) -> Path:
    """The folder in which what a user gave is kept."""
    found = given(data)
    assert isinstance(found, Data)
    every = {**DataConfig().model_dump(mode="json"), **keys}
    write(found, place, every["label"], columns(task, every))
    return place


def rows(place: Path, part: str = "train") -> list[dict[str, Any]]:
    return parquet.read_table(place / f"{part}.parquet").to_pylist()


def loaded(data: Any, run: Path, **keys: Any) -> Any:
    """As a run has it: the data set, from the folder of the run."""
    kept(data, run / KEPT / "data", **keys)
    return load(TASK, DataConfig(source=f"{RUN}data", **keys), 0, run)


BY_CLIENT = {"partition": "column", "column": "client"}


# ---- clients -----------------------------------------------------------------------------------------------------------


def test_clients_are_numbered_in_the_order_in_which_they_are_given(tmp_path: Path) -> None:
    tables = [[{"text": f"{k}", "label": label} for label in "xy" for _ in range(2)] for k in range(12)]
    for name, data, wanted in (
        ("list", tables, [f"client {k}" for k in range(12)]),
        ("mapping", {"south": tables[0], "north": tables[1]}, ["south", "north"]),
        ("numbers", {7: tables[0], 3: tables[1]}, ["7", "3"]),
    ):
        dataset = loaded(data, tmp_path / name, **BY_CLIENT)
        parts = split(dataset, DataConfig(**BY_CLIENT), None, 0)
        assert list(parts.names) == wanted
        held = [{dataset.train.inputs[row] for row in mine} for mine in parts.train]
        assert held == [{str(k)} for k in range(len(wanted))]
    # A column of a file of the user's has no order but that of names: that is how earlier versions numbered them.
    parquet.write_table(pa.table({**COLUMNS, "who": [*"bbaacc"]}), tmp_path / "own.parquet")
    own = DataConfig(source=str(tmp_path / "own.parquet"), partition="column", column="who")
    assert split(load(TASK, own, 0), own, None, 0).names == ("a", "b", "c")


def test_an_error_names_the_row_of_the_clients_own_table(tmp_path: Path) -> None:
    lacking = [{"text": "a", "label": "x"}, {"text": "b", "label": None}]
    with pytest.raises(BadInput, match=r"^data \(train\): column 'label' has no value in row 2 of south$"):
        loaded({"north": ROWS, "south": lacking}, tmp_path / "clients", **BY_CLIENT)
    says = r"^data \(test\): column 'label' has no value in row 2$"
    with pytest.raises(BadInput, match=says):
        loaded({"train": ROWS, "test": lacking}, tmp_path / "parts")
    place = kept({"train": ROWS, "test": lacking}, tmp_path / GIVEN / "data")  # of a comparison
    with pytest.raises(BadInput, match=says):
        load(TASK, DataConfig(source=str(place)), 0)


def test_class_names_are_matched_by_name(tmp_path: Path) -> None:
    """Whatever number each table gives them: a by-hand case, negative and positive the other way round."""
    one, other = Named([0, 1, 1], ["neg", "pos"]), Named([0, 1, 1, -1], ["pos", "neg"])
    place = kept({"train": one, "test": other}, tmp_path / "parts")
    assert json.loads((place / "labels.json").read_text()) == ["neg", "pos"]
    assert [row["label"] for row in rows(place)] == [0, 1, 1] and [row["label"] for row in rows(place, "test")] == [1, 0, 0, -1]
    more = Named([2, 0], ["pos", "neg", "neutral"])
    place = kept({"a": one, "b": more}, tmp_path / "clients")
    assert json.loads((place / "labels.json").read_text()) == ["neg", "pos", "neutral"]
    assert [row["label"] for row in rows(place)] == [0, 1, 1, 2, 1]
    with pytest.raises(BadInput, match="label_names cannot say what their labels mean"):
        write(Data(one, other, label_names=["no", "yes"]), tmp_path / "both", "label", None)


# ---- parts -------------------------------------------------------------------------------------------------------------


def test_parts_are_known_by_any_name_that_folders_may_give_them() -> None:
    for names in (("train", "test", "validation"), ("Train", "Test", "valid"), ("TRAIN", "test", "val"), ("train", "test", "dev")):
        found = given(dict(zip(names, (ROWS[:3], ROWS[3:4], ROWS[4:]), strict=True)))
        assert isinstance(found, Data)
        assert (found.train, found.test, found.validation, found.column) == (ROWS[:3], ROWS[3:4], ROWS[4:], None)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": ROWS, "north": ROWS}, "data: north: no part of a data set, as train, test and validation are"),
        ({"train": ROWS, "val": ROWS, "dev": ROWS}, "data: train, val, dev: one train part is needed"),
        ({"test": ROWS}, "data: test: one train part is needed"),
        ({0: ROWS, "0": ROWS}, "data: two clients are called '0'"),
        ([ROWS, {"text": [], "label": []}], r"data of client 1 \(train\): no rows"),
        ([ROWS, [{"body": "a", "label": "x"}]], r"data of client 1 \(train\): no column 'text', which others have"),
        ([], r"data \(train\): no rows"),
        ({"north": "a.csv", "south": "b.csv"}, "column 'north' is one text, not a list of values; files by client"),
        (Data("train.csv"), r"str is no table; possible: .*; a name, a file or a folder stands alone"),
        (Streamed([0], ["a"]), "Streamed is no table"),
        ([{"text": "a", "label": 2**70}], r"data \(train\): not a table: column 'label': "),
        ({"text": ["a"], "label": ["x", "y"]}, r"data \(train\): not a table: "),
    ],
)
def test_what_is_no_data_is_refused(data: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=says) as error:
        kept(data, tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("name", ["a/b", "", " ", None, "..", "a\\b"])
def test_a_name_is_that_of_a_folder(name: Any) -> None:
    with pytest.raises(BadInput, match="data: name = "):
        Data(ROWS, name=name)
    with pytest.raises(BadInput, match="there is no train part"):
        Data(None)


# ---- tables ------------------------------------------------------------------------------------------------------------


def test_every_type_of_text_is_text(tmp_path: Path) -> None:
    """Categories, views and small strings, as data frames have them; and clients whose frames differ in them."""
    coded = pa.array(COLUMNS["label"]).dictionary_encode()
    viewed = pa.DictionaryArray.from_arrays(coded.indices, coded.dictionary.cast(pa.string_view()))
    kinds = [viewed, coded, pa.array(COLUMNS["label"]), pa.array(COLUMNS["label"], pa.string_view())]
    tables = [Frame({"text": COLUMNS["text"], "label": kind}) for kind in kinds]
    place = kept(tables, tmp_path / "clients")
    assert [(row["text"], row["label"]) for row in rows(place)] == [(row["text"], row["label"]) for row in ROWS] * 4
    chats = pa.array([[{"role": "user", "content": "a"}]], pa.list_(pa.struct({"role": pa.string_view(), "content": coded.type})))
    assert rows(kept({"messages": chats}, tmp_path / "chats", "causal_lm"))[0]["messages"] == [{"role": "user", "content": "a"}]
    numbers = table({"label": pa.array([3, 5]).dictionary_encode()}, "x")
    assert numbers.column("label").type == pa.int64()


def test_a_column_that_is_not_used_is_there_by_name_alone(tmp_path: Path) -> None:
    """So it may hold what no table can."""
    strange = [object(), 2**70, "a", 1.5, None, {1}]
    for name, data in (
        ("columns", {**COLUMNS, "other": strange}),
        ("rows", [{**row, "other": x} for row, x in zip(ROWS, strange, strict=True)]),
        ("frame", Frame({**COLUMNS, "other": strange})),
        ("table", pa.table({**COLUMNS, "other": list(range(6))})),
    ):
        assert rows(kept(data, tmp_path / name)) == [{**row, "other": None} for row in ROWS]
    with pytest.raises(BadInput, match=r"not a table: column 'other'"):
        kept({**COLUMNS, "other": strange}, tmp_path / "used", text="other")
    assert rows(kept({**COLUMNS, "more": [1] * 6}, tmp_path / "own", "package.module:Task"))[0]["more"] == 1  # may read any


def test_a_key_that_the_first_row_lacks_is_a_column(tmp_path: Path) -> None:
    assert rows(kept([{"text": "a"}, {"text": "b", "label": "x"}], tmp_path)) == [
        {"text": "a", "label": None},
        {"text": "b", "label": "x"},
    ]


def test_data_is_the_same_by_what_it_holds(tmp_path: Path) -> None:
    """Not by the bytes of files: of another kind of table, and of earlier versions, which kept every column as it came."""
    fresh = kept(COLUMNS, tmp_path / "fresh")
    (tmp_path / "old").mkdir()
    parquet.write_table(pa.table({**COLUMNS, "other": np.arange(6)}), tmp_path / "old" / "train.parquet", compression="none")
    assert same(tmp_path / "old", fresh) and same(kept(Frame(COLUMNS), tmp_path / "frame"), fresh)
    others = {
        "rows": ROWS[:5],
        "values": [*ROWS[:5], {"text": "other", "label": "x"}],
        "parts": {"train": ROWS, "test": ROWS},
        "names": Data(ROWS, label_names=["x", "y", "z"]),
        "columns": {"text": COLUMNS["text"]},
    }
    for name, data in others.items():
        assert not same(kept(data, tmp_path / name), fresh), name
    assert not same(tmp_path / "nothing", fresh)
    clients = kept([ROWS[:3], ROWS[3:]], tmp_path / "clients")
    (tmp_path / "sorted").mkdir()
    (tmp_path / "sorted" / "train.parquet").write_bytes((clients / "train.parquet").read_bytes())
    assert same(tmp_path / "sorted", clients)  # of an earlier version, which kept no order
    assert not same(kept({"b": ROWS[:3], "a": ROWS[3:]}, tmp_path / "named"), clients)
