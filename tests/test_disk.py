"""One process at a time for a folder, also before it is there."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest

from fedlora import disk
from fedlora.disk import alone, founding, write_all
from fedlora.errors import BadInput


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.05)


def test_a_folder_is_founded_once_and_its_lock_goes_along(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "run"
    with founding(out) as place:
        assert place.parent == out.parent and not out.exists()
        with pytest.raises(BadInput, match="another process"), founding(out):
            raise AssertionError("two found one folder")
        (place / "content").write_text("mine")
        os.rename(place, out)
        with pytest.raises(BadInput, match="another process"), alone(out):
            raise AssertionError("the lock was lost on the way")
        with pytest.raises(BadInput, match="exists already"), founding(out):
            raise AssertionError("founded over a folder that is there")
    assert (out / "content").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_what_was_not_built_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), founding(tmp_path / "a" / "b" / "run") as place:
        (place / "half").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".run.part" / "folder").mkdir(parents=True)
    (tmp_path / ".run.part" / "file").write_text("stale")
    with founding(tmp_path / "run") as place:
        assert {path.name for path in place.iterdir()} == {".lock"}


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_what_cannot_be_made_is_said_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot be made: .*; use another --out"), founding(tmp_path / name):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_made_once_while_others_wait(tmp_path: Path) -> None:
    """Four at once: locks of one process keep out its own threads, too."""
    made, folder = [], tmp_path / "deep" / "kept"

    def make(part: Path) -> None:
        made.append(part)
        (part / "one").write_text("1")
        sleep(0.05)
        assert not folder.exists()
        (part / "two").write_text("2")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: sorted(file.name for file in disk.made_once(folder, make).iterdir()), range(4)))
    assert found == [["one", "two"]] * 4 and len(made) == 1


def test_a_folder_that_could_not_be_made_is_not_there(tmp_path: Path) -> None:
    def fails(part: Path) -> None:
        (part / "half").write_text("1")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        disk.made_once(tmp_path / "kept", fails)
    assert not [place for place in tmp_path.iterdir() if place.is_dir()]
    assert not list(disk.made_once(tmp_path / "kept", lambda part: None).iterdir())


@pytest.mark.parametrize("fails", range(4))
def test_files_that_belong_together_are_there_in_their_order(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stops, each file is whole, old or new, and none is new before those that stand before it."""
    files = {tmp_path / name: f"new {name}".encode() for name in ("data", "manifest")}
    for path in files:
        path.write_bytes(b"old")
    left, real = [fails], {name: getattr(os, name) for name in ("fsync", "replace")}

    def counting(name: str):
        def call(*args: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(disk.os, name, counting(name))
    with pytest.raises(OSError, match="No space left"):
        write_all(files)
    found = [path.read_bytes() for path in files]
    assert found == [b"new data" if fails == 3 else b"old", b"old"]
    monkeypatch.undo()
    write_all(files)
    assert [path.read_bytes() for path in files] == list(files.values()) and len(list(tmp_path.iterdir())) == 2
