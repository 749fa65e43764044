"""Files as people have them: as Excel and others write them, packed, damaged, and with labels that look like something else."""

import gzip
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import load

from fedlora.config import DataConfig, SourceConfig, resolve
from fedlora.data import formats
from fedlora.data.dataset import Dataset
from fedlora.errors import BadInput
from fedlora.tables import setting

ROWS = [("eins; zwei, drei", "01"), ('ein "Zitat"', "TRUE"), ("zwei\r\nZeilen", "NA"), ("Grüße für 5 €", "01")]


def quoted(delimiter: str, rows: list[tuple[str, ...]] = ROWS, header: tuple[str, ...] = ("text", "label")) -> str:
    """A table with every value quoted, by hand and not by the csv module."""
    return "".join(delimiter.join('"' + v.replace('"', '""') + '"' for v in row) + "\r\n" for row in (header, *rows))


def rows_of(path: Path, **settings: Any) -> list[tuple[str, str]]:
    """The texts and labels of a file as its reader gives them."""
    part = formats.read_file(path, SourceConfig(str(path), "text", "label", **settings))
    return list(zip(part.table["text"].to_pylist(), part.table["label"].to_pylist(), strict=True))


def read(source: Path, **settings: Any) -> Dataset:
    return load(DataConfig(source=str(source), **settings), seed=0)


def fault(source: Path, **settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{source}: ")


# ---- delimiters and encodings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.TXT"])
def test_delimiter_and_encoding_are_found_out(tmp_path: Path, delimiter: str, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes(quoted(delimiter).encode(encoding))
    assert rows_of(tmp_path / name) == ROWS


def test_utf_16_of_either_order(tmp_path: Path) -> None:
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        (tmp_path / "a.csv").write_bytes(mark + quoted(";").encode(encoding))
        assert rows_of(tmp_path / "a.csv") == ROWS
        (tmp_path / "a.csv").write_bytes(quoted(";").encode(encoding))
        assert rows_of(tmp_path / "a.csv", encoding=encoding) == ROWS
        assert "it looks like UTF-16 without a byte-order mark: data.encoding = 'utf-16-le'" in fault(tmp_path / "a.csv")


def test_cp1252_is_noted_and_utf_8_is_not(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    body = quoted(";", [*ROWS, *ROWS])
    file.write_bytes(body.encode("cp1252"))
    note = f"{file}: it is not UTF-8, so it is read as cp1252, as Windows writes; data.encoding names another"
    assert note in read(file).notes
    file.write_bytes(body.encode())
    assert not any("cp1252" in note for note in read(file).notes)


def test_a_forced_encoding_goes_first(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(quoted(",", [("привет", "x"), ("мир", "y")]).encode("koi8-r"))
    assert rows_of(file, encoding="koi8-r") == [("привет", "x"), ("мир", "y")]
    assert rows_of(file) != rows_of(file, encoding="koi8-r")
    file.write_bytes(b"\xef\xbb\xbf" + quoted(",").encode())
    assert rows_of(file, encoding="utf-8") == ROWS  # the mark is no part of the first name


def test_what_is_in_no_encoding_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"text,label\na,1\n\x81,2\n")
    assert fault(file) == "line 3 is neither UTF-8 nor cp1252; data.encoding names what it is"
    assert fault(file, encoding="ascii") == "line 3 is not ascii; data.encoding names what it is"


def test_a_delimiter_inside_a_name_or_a_text_is_none(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text;label;a, b, c and d\nx, y;1;\nz;2;\n")
    assert rows_of(file) == [("x, y", "1"), ("z", "2")]
    file.write_text("label,text\n1,a;b|c\n2,;;;\n")
    assert rows_of(file) == [("a;b|c", "1"), (";;;", "2")]


def test_a_forced_delimiter_and_the_hint_that_helps(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text;label\nx;1\ny;2\n")
    hint = """no column 'label'; it has 'text;label'; it looks as if the columns are separated by ';': data.delimiter = ";\""""
    assert fault(file, delimiter=",") == hint
    file.write_text(quoted(";"))
    assert fault(file, delimiter=",").startswith("line 1: ',' expected after '\"'; it looks as if the columns are separated by ';'")
    file.write_text("text^label\nx^1\ny^2\n")
    assert fault(file).endswith("it has 'text^label'; columns are separated by ',', ';', tabs, '|' or by what data.delimiter says")
    assert rows_of(file, delimiter="^") == [("x", "1"), ("y", "2")]
    assert fault(file, delimiter="^", text="body") == "no column 'body'; it has 'text', 'label'; data.text names the column"
    file.write_text("Text;Label\nx;1\n")
    assert fault(file) == "no column 'label'; it has 'Text', 'Label'; data.label names the column"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("data.delimiter=ab", "one character that separates columns"),
        ('data.delimiter="\\n"', "one character"),
        ("data.encoding=nope", "data.encoding = 'nope': not an encoding of text"),
        ("data.encoding=hex", "not an encoding of text"),
        ("data.source=", 'data.source = ""'),
        ('data.source=["a.csv", " "]', 'data.source = ""'),
        ("data.validation=1.0", "data.validation = 1.0"),
        ("data.validation=-0.1", "data.validation = -0.1"),
        ("data.validation=nan", "data.validation = nan"),
        ("data.test_limit=0", "data.test_limit = 0"),
    ],
)
def test_settings_that_cannot_be(assignment: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        resolve(setting(assignment))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("assignment", ["data.delimiter=;", "data.delimiter=|", 'data.delimiter="\\t"', "data.encoding=latin-1"])
def test_settings_that_can_be(assignment: str) -> None:
    resolve(setting(assignment))


# ---- packed, JSON, Excel -----------------------------------------------------------------------------------------------


def json_lines(rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


def json_list(rows: list[tuple[str, str]]) -> str:
    return json.dumps([{"text": text, "label": label} for text, label in rows], indent=1)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".jsonl", ".json", ".JSON"])
def test_packed_files_of_every_kind_of_text(tmp_path: Path, suffix: str) -> None:
    text = {".jsonl": json_lines, ".json": json_list, ".JSON": json_lines}.get(suffix, lambda rows: quoted(",", rows))(ROWS)
    file = tmp_path / f"tickets{suffix}.gz"
    file.write_bytes(gzip.compress(text.encode()))
    assert rows_of(file) == ROWS
    assert read(file).name == "tickets"
    file.write_bytes(gzip.compress(text.encode())[:-20])
    assert fault(file).startswith(f"cannot be read as {suffix[1:].lower()}: ")
    file.write_bytes(text.encode())
    assert "Not a gzipped file" in fault(file)


def test_json_values_are_the_text_of_a_csv(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"label": 7, "text": 3}, {"text": null, "label": true}, {"more": [1, {}], "label": "07"}]')
    assert rows_of(file) == [("3", "7"), (None, "true"), (None, "07")]


def test_an_unpaired_surrogate_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d", "label": 1}\n{"text": "b", "label": 2}\n')
    assert "surrogates not allowed" in fault(tmp_path / "a.jsonl")


def test_excel(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "tickets"
    cells = [("01", "a\nb"), (7, 12), (True, "NA"), (datetime(2020, 1, 31), "x"), (1.5, None)]
    for row in (("label", "text", None), *cells, (None, None), ("", "")):
        sheet.append(row)
    file = tmp_path / "Tickets.XLSX"
    book.save(file)
    assert rows_of(file) == [("a\nb", "01"), ("12", "7"), ("NA", "TRUE"), ("x", "2020-01-31"), (None, "1.5")]
    book.create_sheet("second")
    sheet["A3"] = " "
    book.save(file)
    assert fault(file) == "column 'label' has no value in row 3"  # of the sheet
    sheet["A3"] = "01"
    book.save(file)
    data = read(file)
    assert (data.name, data.schema.label_names) == ("Tickets", ("01", "1.5", "2020-01-31", "TRUE"))
    assert data.notes[0] == f"{file}: of 2 sheets the first, 'tickets', is read"
    file.write_bytes(b"PK no workbook")
    assert fault(file).startswith("cannot be read as xlsx: ")
    openpyxl.Workbook().save(file)
    assert fault(file) == "sheet 'Sheet' is empty"


def test_excel_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    assert fault(tmp_path / "a.xlsx") == "Excel files need the package openpyxl: pip install openpyxl; or save it as csv"


# ---- labels ------------------------------------------------------------------------------------------------------------

LABELS = ["01", "1", "TRUE", "true", "NA", "null", "nan", "1e3", "-0", " x", "ä"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".xlsx", ".parquet"])
def test_labels_are_the_text_that_was_written(tmp_path: Path, suffix: str) -> None:
    rows = [(f"t{i}", LABELS[i % len(LABELS)]) for i in range(3 * len(LABELS))]
    for part in ("train", "test"):
        file = tmp_path / f"{part}{suffix}"
        match suffix:
            case ".xlsx":
                book = openpyxl.Workbook()
                for row in (("text", "label"), *rows):
                    book.active.append(row)
                book.save(file)
            case ".parquet":
                import pyarrow as pa
                from pyarrow import parquet

                parquet.write_table(pa.table({"text": [t for t, _ in rows], "label": [l for _, l in rows]}), file)
            case ".jsonl" | ".json":
                file.write_text((json_lines if suffix == ".jsonl" else json_list)(rows))
            case _:
                file.write_text(quoted("," if suffix == ".csv" else "\t", rows))
    data = read(tmp_path)
    assert [data.schema.label_names[c] for c in data.train.targets] == [label for _, label in rows]
    assert data.notes[0].startswith("classes that differ only in spaces or case: 'TRUE' and 'true'; ")


def test_classes_that_differ_only_in_spaces_or_case(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text('text,label\na,Yes\nb,"yes "\nc,no\nd,card  lost\ne,Card lost\n')
    (tmp_path / "test.csv").write_text("text,label\nz,no\n")
    told = "'Card lost' and 'card  lost', 'Yes' and 'yes '"
    assert read(tmp_path).notes == (f"classes that differ only in spaces or case: {told}; each is a class of its own",)


# ---- damaged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"\n\r\n", "the file is empty"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"text,label\na\nb,2,3\n", "line 2 has 1 values, but the header names 2 columns"),
        ("a.csv", b'text,label\n"a\n\nb",1\n\nc,2,3\n', "line 6 has 3 values, but the header names 2 columns"),
        ("a.csv", b'text,label\n\n"a\nb",1\nc,\n', "column 'label' has no value in line 5"),
        ("a.csv", b'text,label\n"a\nb",1\nc," "\n', "column 'label' has no value in line 4"),
        ("a.csv", b'text,label\nx,1\n"a,1\nb,2\n', "line 3: a quotation mark that is never closed"),
        ("a.csv", b'text,label\nx,1\n"a"b,1\n', "line 3: ',' expected after '\"'"),
        ("a.tsv", b"text\tlabel\na\tb\tc\n", "line 2 has 3 values, but the header names 2 columns"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n' * 6 + b'{"text": "a", "la\n', "line 7 is not valid JSON: "),
        ("a.jsonl", b'{"text": "a", "label": 1}\n\n\r\n  \n{"text": 1 2}\n', "line 5 is not valid JSON: "),
        ("a.jsonl", b'\n{"text": "a", "label": 1}\n\n{"text": "a"}\n', "column 'label' has no value in line 4"),
        ("a.jsonl", b'\n{"text": "a", "label": 1}\n7\n', 'line 3 is no object, as in {"text": ..., "label": ...}'),
        ("a.jsonl", b'{"text": ["a"], "label": 1}\n', "column 'text', line 1: a list, not text"),
        ("a.jsonl", b'{"text": "a", "label": {}}\n', "column 'label', line 1: an object, not text"),
        ("a.jsonl", b'{"text": "a", "label": 1' + b"0" * 5000 + b"}\n", "line 1 cannot be read as JSON: "),
        ("a.json", b'[{"text": "a", "label": 1},\n\n {"text": "a" "label": 1}]', "line 3 is not valid JSON: "),
        ("a.json", b'[{"text": "a", "label": 1}, 7]', "row 2 is no object"),
        ("a.json", b'{"data": [\n{"text": "a", "label": 1}]}', "line 1 is not valid JSON: "),
        ("a.json", b"[]", "the file is empty"),
        ("a.parquet", b"PAR1 but no more", "cannot be read as parquet: "),
        ("a.parquet", b"", "Parquet file size is 0 bytes"),
    ],
)
def test_a_damaged_file(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert reason in fault(tmp_path / name)


def test_a_long_fault_is_cut() -> None:
    assert formats.one_line("a\n b" * 100, limit=8) == "a ba ba…"


@given(content=st.one_of(st.binary(max_size=60), st.text('a1,;"\n\r\t|[]{}: ', max_size=60).map(str.encode)))
@example(content=b"{}")
@settings(max_examples=50, deadline=None)
def test_whatever_stands_in_a_file_is_read_or_refused_in_one_line(tmp_path_factory: Any, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for suffix in (".csv", ".jsonl", ".json"):
        file = folder / f"any{suffix}"
        file.write_bytes(content)
        try:
            part = formats.read_file(file, SourceConfig(str(file), "a", "1"))
            assert part.numbers is not None and len(part.numbers) == part.table.num_rows
        except BadInput as error:
            assert "\n" not in str(error) and str(file) in str(error)


# ---- folders -----------------------------------------------------------------------------------------------------------


def test_parts_are_found_whatever_their_case(tmp_path: Path) -> None:
    body = quoted(";")
    (tmp_path / "Train.csv").write_text(body)
    (tmp_path / "TEST.CSV").write_text(body)
    (tmp_path / "Dev.Csv.GZ").write_bytes(gzip.compress(body.encode()))
    data = read(tmp_path)
    assert data.validation is not None
    assert data.train.inputs == data.test.inputs == data.validation.inputs == tuple(text for text, _ in ROWS)
    assert f"the validation part is {tmp_path / 'Dev.Csv.GZ'}, 4 examples" in data.notes


def test_two_files_for_one_part(tmp_path: Path) -> None:
    for name in ("train.csv", "valid.csv", "dev.csv"):
        (tmp_path / name).write_text(quoted(","))
    assert fault(tmp_path) == "more than one validation file: dev.csv, valid.csv"
    (tmp_path / "valid.csv").unlink()
    (tmp_path / "TRAIN.csv.gz").write_bytes(gzip.compress(quoted(",").encode()))
    assert "more than one train file: TRAIN.csv.gz, train.csv" in fault(tmp_path)
