"""`fedlora predict` answers with the model that was scored, in each format, from each kind of input."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
import tiny
from safetensors.numpy import load_file

from fedlora.config import resolve
from fedlora.runs import play
from fedlora.runs.predict import predict
from fedlora.summary import read_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/common, and runs/own with a personal head and clients that have names; the model's name is relative to here."""
    place = tmp_path_factory.mktemp("place")
    (place / "base").mkdir()
    tiny.save_model("bert", place / "base")
    for part, count in (("train", 90), ("test", 45)):
        texts, labels = tiny.examples(count, count)
        lines = [f"{('north', 'south')[i % 2]},{text},{label}" for i, (text, label) in enumerate(zip(texts, labels, strict=True))]
        (place / f"{part}.csv").write_text("\n".join(["owner,words,label", *lines]) + "\n")
    before = Path.cwd()
    os.chdir(place)
    try:
        data = {"source": ".", "text": "words", "partition": "column", "column": "owner"}
        train = {"rounds": 2, "batch_size": 8, "lr": 2e-2}
        base = {"model": {"source": "base"}, "data": data, "clients": {"rank": 2}, "train": train, "method": {"name": "fedit"}}
        play.execute(resolve(base), Path("runs/common"), False, tiny.Silent())
        play.execute(resolve(base, {"model": {"head": "personal"}}), Path("runs/own"), False, tiny.Silent())
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    return tiny.console(monkeypatch, capsys, tmp_path)


def scored_texts(place: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((place / "test.csv").read_text().splitlines()))


def test_the_common_model_is_the_one_that_was_scored(place: Path, fedlora) -> None:
    """Also from another folder, although the run names its model by a relative path."""
    status, out, err = fedlora("predict", place / "runs" / "common", "--input", place / "test.csv", "--format", "csv")
    assert status == 0, err
    found, rows = list(csv.DictReader(io.StringIO(out))), scored_texts(place)
    assert [row["text"] for row in found] == [row["words"] for row in rows]
    right = sum(one["label"] == row["label"] for one, row in zip(found, rows, strict=True)) / len(rows)
    assert right == pytest.approx(read_rows(place / "runs" / "common")[-1]["accuracy"])
    for row in found:
        each = {name: float(row[f"p({name})"]) for name in tiny.CLASSES}
        assert sum(each.values()) == pytest.approx(1, abs=1e-5) and max(each, key=lambda name: each[name]) == row["label"]
        assert float(row["probability"]) == max(each.values())


def test_each_client_has_its_own_and_is_known_by_name_or_number(place: Path, fedlora) -> None:
    stored = read_rows(place / "runs" / "own")[-1]["client_accuracy"]
    for id, name in enumerate(("north", "south")):
        own = [row for row in scored_texts(place) if row["owner"] == name]
        found = predict(place / "runs" / "own", [row["words"] for row in own], client=name)
        assert found == predict(place / "runs" / "own", [row["words"] for row in own], client=id)
        right = sum(answer["label"] == row["label"] for answer, row in zip(found, own, strict=True)) / len(own)
        assert right == pytest.approx(stored[str(id)])
    status, out, err = fedlora("predict", place / "runs" / "own", "w1")
    assert status == 2 and not out and "no common one was scored; give --client: north, south" in err
    one, other = (fedlora("predict", place / "runs" / "own", "w1 w2", "--client", name)[1] for name in ("north", "south"))
    assert one != other


def test_an_adapter_says_whose_it_is(place: Path, fedlora, tmp_path: Path) -> None:
    assert "| whose | everybody's model |" in (place / "runs" / "common" / "adapter" / "README.md").read_text()
    assert "each ended with a model of its own" in (place / "runs" / "own" / "adapter" / "README.md").read_text()
    status, _, err = fedlora("export", place / "runs" / "own", "--to", "south", "--client", "south")
    assert status == 0, err
    assert "the model of client 1 alone" in (tmp_path / "south" / "README.md").read_text()
    assert load_file(tmp_path / "south" / "adapter_model.safetensors").keys()


def test_formats_and_inputs_say_the_same(place: Path, fedlora, tmp_path: Path) -> None:
    texts = ["w1\tapple", "back\\slash", "", "  ", "w2 cherry"]
    (tmp_path / "new.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in texts))
    common = place / "runs" / "common"
    status, tsv, err = fedlora("predict", common, *texts)
    assert status == 0, err
    assert [line.split("\t")[2] for line in tsv.splitlines()] == ["w1\\tapple", "back\\\\slash", "", "  ", "w2 cherry"]
    for file in ("new.txt", "new.jsonl"):
        assert fedlora("predict", common, "--input", file)[1] == tsv
    assert fedlora("predict", common, stdin="\ufeff" + "\r\n".join(texts) + "\r\n")[1] == tsv
    status, out, _ = fedlora("predict", common, "--batch", "2", "--format", "json", stdin="\n".join(texts))
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [f"{row['label']}\t{row['probability']:.3f}" for row in rows] == [line.rpartition("\t")[0] for line in tsv.splitlines()]
    assert all(list(row["probabilities"]) == list(tiny.CLASSES) for row in rows)


BAD = {
    "not UTF-8": ([], b"w1\ncaf\xe9\n", "standard input: line 2 is not UTF-8"),
    "nothing": ([], b"", "no text"),
    "an argument that is not UTF-8": (["caf\udce9"], b"", "text 1 is not UTF-8"),
    "both": (["w1", "--input", "new.txt"], b"", "give one of them"),
    "no such file": (["--input", "nowhere.txt"], b"", "nowhere.txt: No such file"),
    "a folder": (["--input", "."], b"", ". is a folder"),
    "a type that is none": (["--input", "new.pdf"], b"", "possible: .txt, .csv"),
    "no such column": (["--input", "other.csv"], b"", "no column 'words'"),
    "format": (["w1", "--format", "xml"], b"", "unknown --format 'xml'; possible: csv, json, tsv"),
    "client of a common model": (["w1", "--client", "0"], b"", "one model for all"),
    "no such client": (["w1", "--client", "east"], b"", "clients 0 to 1: north, south"),
    "domain of one data set": (["w1", "--domain", "x"], b"", "leave --domain out"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_labelled_is_one_line(case: str, place: Path, fedlora, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("text,label\nw1,apple\n")
    args, stdin, says = BAD[case]
    status, out, err = fedlora("predict", place / "runs" / "common", *args, stdin=stdin)
    assert status == 2 and not out and len(err.splitlines()) == 1 and says in err
