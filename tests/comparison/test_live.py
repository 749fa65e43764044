"""The live table, and the lines where there is no terminal."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.comparison import live
from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Grid, expand
from fedlora.comparison.live import CellProgress, LiveTable, seconds_a_round
from fedlora.comparison.recipe import Header, Recipe


@pytest.fixture
def grid() -> Grid:
    tables = {"method": [{"name": "fedit"}, {"name": "fedavg"}], "data": {"alpha": [0.5, 0.1]}, "train": {"rounds": 10}}
    return expand(Recipe(Header(name="live"), tables))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    return now


def shown(table: LiveTable, height: int = 40) -> list[str]:
    table.console = Console(width=120, height=height, record=True, file=StringIO())
    table.console.print(table.table())
    return [line.rstrip() for line in table.console.export_text().splitlines()]


def finish(folder: Folder, grid: Grid, place: int, accuracy: float) -> None:
    folder.run(grid.cells[place]).mkdir(parents=True)
    text = f'{{"rounds": 10, "final": {{"accuracy": {accuracy}}}}}'
    (folder.run(grid.cells[place]) / "summary.json").write_text(text)


def test_the_table_says_where_each_cell_is_and_how_long_it_takes(grid: Grid, clock: list[float], tmp_path: Path):
    folder = Folder(tmp_path)
    finish(folder, grid, 0, 0.5)  # before we began
    table = LiveTable(grid, folder, jobs=2, quiet=False)
    listener = table.follow(grid.cells[1])
    for number, accuracy in ((1, 0.25), (2, None)):
        clock[0] += 60.0
        listener.round({"round": number, "score": accuracy})
    text = shown(table)
    assert [line.split() for line in text[:5]] == [
        ["cell", "state", "round", "accuracy", "left"],
        ["fedit,", "alpha", "0.5", "done", "10/10", "50.0", "%"],
        ["fedavg,", "alpha", "0.5", "running", "2/10", "25.0", "%", "8", "min"],  # 8 rounds of 60 s
        ["fedit,", "alpha", "0.1", "waiting", "0/10"],
        ["fedavg,", "alpha", "0.1", "waiting", "0/10"],
    ]
    assert "1 of 4 done, about 14 min left" in text[5]  # 8 + 10 + 10 rounds, two at a time
    folder.failed(grid.cells[1], "no memory")
    table.finished(grid.cells[1])
    assert "failed" in shown(table)[2] and "1 of 4 done, 1 failed" in shown(table)[5]


def test_a_low_terminal_shows_the_cells_that_run(grid: Grid, tmp_path: Path):
    tables = {"seed": list(range(50)), "method": {"name": "fedit"}}
    many = expand(Recipe(Header(name="many"), tables))
    table = LiveTable(many, Folder(tmp_path), jobs=1, quiet=False)
    for cell in many.cells[:30]:
        table.lines[cell.hash].state = live.State.DONE
    table.follow(many.cells[30])
    text = shown(table, height=16)
    assert len(text) <= 16 and any("seed 30" in line and "running" in line for line in text)


def test_seconds_are_those_of_the_method_where_it_has_played(grid: Grid):
    fast, slow, other, _ = (CellProgress(cell) for cell in grid.cells)
    fast.played, fast.seconds, slow.played, slow.seconds = 2, 10.0, 1, 50.0
    assert seconds_a_round([fast, slow, other]) == {"fedit": 5.0, "fedavg": 50.0, "": 20.0}


def test_elsewhere_a_line_a_finished_cell(
    grid: Grid, clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = Folder(tmp_path)
    with LiveTable(grid, folder, jobs=1, quiet=False) as table:
        listener = table.follow(grid.cells[0])
        clock[0] = 30.0
        listener.round({"round": 10, "score": 0.5})
        finish(folder, grid, 0, 0.5)
        table.finished(grid.cells[0])
        listener.note("a note")
        table.note("a note")
        folder.failed(grid.cells[1], "no memory")
        table.finished(grid.cells[1])
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "1/4  fedit, alpha 0.5: done, accuracy 50.0 %  30 s",
        "2/4  fedavg, alpha 0.5: failed, no memory  0 s",
    ]
    assert err.splitlines() == ["note: a note"]
    with LiveTable(grid, folder, jobs=1, quiet=True) as table:
        table.finished(grid.cells[0])
    assert capsys.readouterr().out == ""
