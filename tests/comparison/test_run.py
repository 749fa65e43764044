"""Comparisons on a tiny model: what is kept, what is run again, and that it does not matter how they were stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from fedlora.comparison import folder as folders
from fedlora.comparison import recipe as recipes
from fedlora.comparison.executor import executor
from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell, Grid, expand
from fedlora.comparison.play import play
from fedlora.comparison.recipe import Recipe
from fedlora.comparison.run import write_results
from fedlora.config import as_tables
from fedlora.listener import Listener, Quiet, Row
from fedlora.tables import setting

Save = Callable[..., str]


class Hears:
    """Follows a comparison and keeps what it hears."""

    def __init__(self) -> None:
        self.starts: list[str] = []
        self.rounds: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.ends: list[str] = []

    def follow(self, cell: Cell) -> Listener:
        self.starts.append(cell.hash)
        return HearsCell(self, cell)

    def round(self, cell: Cell, number: int) -> None:
        self.rounds.append((cell.hash, number))


class HearsCell(Quiet):
    """Follows one cell."""

    def __init__(self, hears: Hears, cell: Cell) -> None:
        self.hears, self.cell = hears, cell

    def note(self, text: str) -> None:
        self.hears.notes.append(text)

    def round(self, row: Row) -> None:
        self.hears.round(self.cell, row["round"])


def compare(recipe: str, out: Path, jobs: int = 1, settings: tuple[str, ...] = ()) -> tuple[Grid, Folder, Hears]:
    """What `fedlora compare` does but for the checks and the report."""
    plan: Recipe = recipes.read(recipe, None, [setting(each) for each in settings])
    grid, folder, hears = expand(plan), folders.claim(plan, out), Hears()
    folders.begin(folder, plan)
    left = [cell for cell in grid.cells if folder.summary(cell) is None]
    with executor(left, jobs) as player:
        hears.ends += [cell.hash for cell in play(left, folder, hears.follow, player)]
    write_results(grid, plan, folder)
    return grid, folder, hears


def table(out: Path) -> bytes:
    return (out / "results.parquet").read_bytes()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Here and in processes started from here: the number of threads changes the last bits of sums."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


LONG = {"rounds": 12, "batch_size": 8, "lr": 5e-3, "evaluate_every": 6}  # long enough to be stopped in the middle


@pytest.fixture(scope="module")
def whole(tables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A comparison that was never stopped."""
    file = tmp_path_factory.mktemp("whole") / "tiny.toml"
    file.write_text(tomli_w.dumps(tables | {"train": LONG}))
    grid, _, hears = compare(str(file), file.parent / "out")
    assert hears.starts == hears.ends == [cell.hash for cell in grid.cells]
    assert hears.rounds == [(cell.hash, t) for cell in grid.cells for t in range(1, 13)]
    return file.parent / "out"


@pytest.mark.slow
def test_two_comparisons_of_one_seed_are_equal(whole: Path, save: Save, tmp_path: Path):
    compare(save(train=LONG), tmp_path / "again")
    assert table(tmp_path / "again") == table(whole)


@pytest.mark.slow
def test_several_at_a_time_give_the_same_results(whole: Path, save: Save, tmp_path: Path):
    grid, _, hears = compare(save(train=LONG), tmp_path / "two", jobs=2)
    assert sorted(hears.ends) == sorted(cell.hash for cell in grid.cells) and len(hears.rounds) == 24
    assert table(tmp_path / "two") == table(whole)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_cell_and_started_again_equals_never_killed(whole: Path, save: Save, tmp_path: Path):
    recipe, out = save(train=LONG), tmp_path / "out"
    second = out / "cells" / expand(recipes.read(recipe, None)).cells[1].hash
    child = subprocess.Popen(
        [sys.executable, "-c", "from fedlora.cli import main; main()", "compare", recipe, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while child.poll() is None and not (second / "metrics.jsonl").exists():
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not (second / "summary.json").exists()
    _, _, hears = compare(recipe, out)
    assert hears.starts == [second.name]
    assert table(out) == table(whole)


def test_a_finished_cell_never_runs_again(save: Save, tmp_path: Path):
    out = tmp_path / "out"
    assert len(compare(save(), out)[2].starts) == 2
    before = table(out)
    assert compare(save(), out)[2].starts == [] and table(out) == before
    # A changed cell runs, an unchanged one does not; back again, nothing does.
    _, _, hears = compare(save(), out, settings=("data.alpha=[5.0,9.0]",))
    assert len(hears.starts) == 2 and table(out) != before
    assert compare(save(), out)[2].starts == [] and table(out) == before


def test_a_cell_that_fails_leaves_its_reason_and_the_others_finish(save: Save, tmp_path: Path, bert_folder: Path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(bert_folder, model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:1000])
    broken = save(method=[{"name": "fedit", "with": {"model": {"source": str(model)}}}, {"name": "lora-a2"}])
    grid, folder, hears = compare(broken, tmp_path / "out")
    assert len(hears.ends) == 2
    failed = [cell for cell in grid.cells if folder.failure(cell)]
    assert {cell.config.method.name for cell in failed} == {"fedit"}
    assert "\n" not in (folder.failure(failed[0]) or "") and "model.source" in (folder.failure(failed[0]) or "")
    assert "Traceback" in (folder.path / "failed" / f"{failed[0].hash}.txt").read_text()
    page = (tmp_path / "out" / "results.md").read_text()
    assert "1 of 2 runs done, 1 failed" in page and "## Failed" in page
    # Mended, they are tried again, and the failure is forgotten.
    (model / "model.safetensors").write_bytes(weights)
    _, folder, hears = compare(broken, tmp_path / "out")
    assert sorted(hears.starts) == sorted(cell.hash for cell in failed)
    assert not list((tmp_path / "out" / "failed").iterdir())


def test_whatever_a_cell_raises_the_others_finish(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fedlora.runs import play

    execute = play.execute

    def trip(config: Any, *rest: Any) -> Any:
        if config.method.name == "fedit":
            raise ZeroDivisionError("first line\nsecond line")
        return execute(config, *rest)

    monkeypatch.setattr(play, "execute", trip)
    grid, folder, _ = compare(save(), tmp_path / "out")
    found = {cell.config.method.name: folder.failure(cell) for cell in grid.cells}
    assert found == {"fedit": "ZeroDivisionError: first line", "lora-a2": None}


@pytest.mark.slow
def test_a_process_that_is_killed_is_a_failed_cell_and_closing_stops_all(save: Save, tmp_path: Path):
    plan = recipes.read(save(train={"rounds": 2000, "batch_size": 8}), None)
    grid, folder, pids = expand(plan), Folder(tmp_path / "out"), []

    class Kills(Hears):
        def round(self, cell: Cell, number: int) -> None:
            if number == 1 and not pids:  # of the first that plays
                pids.append(children()[0])
                os.kill(pids[0], signal.SIGKILL)

    with executor(grid.cells, 2) as player, closing(play(grid.cells, folder, Kills().follow, player)) as played:
        cell = next(played)
    assert folder.failure(cell) == "its process ended with status -9"
    assert not children()
    assert sum(folder.failure(each) is not None for each in grid.cells) == 1  # those that were stopped have not failed


@pytest.mark.slow
def test_a_process_of_a_comparison_ends_with_it(save: Save, tmp_path: Path):
    """However the comparison ends, no process may go on playing a cell that the next one will play."""
    (cell, *_) = expand(recipes.read(save(train={"rounds": 2000, "batch_size": 8}), None)).cells
    child = subprocess.Popen(
        [sys.executable, "-m", "fedlora.comparison.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stdout is not None
    print(json.dumps({"config": as_tables(cell.config), "folder": str(tmp_path), "threads": 1}), file=child.stdin, flush=True)
    assert json.loads(child.stdout.readline())["round"] == 1
    child.stdin.close()  # as the system does when the parent is killed
    assert child.wait() == 1
    child.stdout.close()


def children() -> list[int]:
    """The cells that this process has started and that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            command = (status.parent / "cmdline").read_bytes()
        except OSError:  # it ended while we looked
            continue
        if int(parent) == os.getpid() and state != "Z" and b"fedlora.comparison.child" in command:
            found.append(int(status.parent.name))
    return found
