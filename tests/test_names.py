"""Files and folders go by their last names, ids as they are."""

from pathlib import Path

import pytest

from fedlora.names import short, told_apart


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("20newsgroups", "20newsgroups"),
        ("org/model", "org/model"),
        ("tickets.csv", "tickets.csv"),
        ("data/tickets.csv.gz", "tickets.csv.gz"),
        ("/home/me/models/bert", "bert"),
        ("./models/bert/", "bert"),
        ("a/b/c", "c"),
        ("~/bert", "bert"),
        ("/", "/"),
    ],
)
def test_short(source: str, name: str) -> None:
    assert short(source) == name


def test_a_folder_that_is_there_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert short("models/bert") == "bert"


def test_equal_last_names_are_told_apart() -> None:
    assert told_apart(["/a/x/train.csv", "/a/y/train.csv", "minilm", "/c/other.csv"]) == {
        "/a/x/train.csv": "x/train.csv",
        "/a/y/train.csv": "y/train.csv",
        "minilm": "minilm",
        "/c/other.csv": "other.csv",
    }
    assert told_apart([]) == {}
