"""Results of comparisons of other tasks than classification, whose runs were written by hand."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fedlora.comparison import check, recipe
from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell, Grid, expand
from fedlora.comparison.live import LiveTable
from fedlora.comparison.markdown import to_markdown
from fedlora.comparison.recipe import Header, Recipe
from fedlora.comparison.results import metrics, rows, write
from fedlora.comparison.run import write_results
from fedlora.errors import BadInput
from fedlora.tasks.metrics import CLASSIFICATION, Metric

MSE = Metric("mse", "mean squared error", "", "lower", "constant_mse", "the mean of the training numbers")
REGRESSION = (MSE, Metric("pearson", "Pearson correlation", ""))
PUBLISHED = "method.name,mse,spread,upload_params\nfedit,0.25,0.01,4000\n"


def plan(**tables: Any) -> Recipe:
    methods = {"method": [{"name": "fedit"}, {"name": "fedavg"}]}
    return Recipe(Header(name="numbers"), methods | {"task": {"name": "number_guessing"}} | tables, None, PUBLISHED)


def finish(folder: Folder, cell: Cell, score: float | None, of: tuple[Metric, ...] = REGRESSION, **final: Any) -> None:
    """A run folder as a run leaves it, as far as a comparison reads it."""
    run = folder.run(cell)
    run.mkdir(parents=True)
    (run / "federation.json").write_text(json.dumps({"clients": [], "metrics": [metric.as_json() for metric in of]}))
    totals = dict.fromkeys(("upload_params", "upload_bytes", "download_params", "download_bytes", "failed"), 1000)
    scores = {"metric": of[0].name, "score": score, of[0].name: score, of[1].name: 0.5, "loss": 1.25}
    summary = {"rounds": cell.config.train.rounds, "final": scores | final, "totals": totals, "written": {"round": 3}}
    (run / "summary.json").write_text(json.dumps(summary))


def test_columns_are_the_metrics_and_the_score_comes_last(tmp_path: Path) -> None:
    grid, folder = expand(plan()), Folder(tmp_path)
    finish(folder, grid.cells[0], 0.2, constant_mse=0.9, validation_mse=0.3)
    found = rows(grid, plan(), folder)
    write(found, grid.varied, tmp_path / "results.parquet")
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.to_pylist() == found
    assert table.column_names == [
        *("method.name", "hash", "status", "error", "personal"),
        *("mse", "pearson", "constant_mse", "validation_mse", "held_out_mse"),
        *("round", "loss", "worst_tenth", "failed_replies", "upload_params", "upload_bytes", "download_params", "download_bytes"),
        *("published_mse", "published_spread", "published_upload_params", "difference", "metric", "score"),
    ]
    (row,) = found
    assert (row["mse"], row["pearson"], row["constant_mse"], row["validation_mse"]) == (0.2, 0.5, 0.9, 0.3)
    assert (row["published_mse"], row["published_spread"], row["published_upload_params"]) == (0.25, 0.01, 4000)
    assert row["difference"] == pytest.approx(-0.05)
    assert (row["metric"], row["score"]) == ("mse", 0.2)


def test_columns_of_classification_are_those_of_before(tmp_path: Path) -> None:
    write([], (), tmp_path / "results.parquet")
    names = pq.read_table(tmp_path / "results.parquet").column_names
    assert names == [
        *("hash", "status", "error", "personal", "accuracy", "macro_f1", "commonest_accuracy", "validation_accuracy"),
        *(
            "held_out_accuracy",
            "round",
            "loss",
            "worst_tenth",
            "failed_replies",
            "upload_params",
            "upload_bytes",
            "download_params",
        ),
        *("download_bytes", "published_accuracy", "published_spread", "published_upload_params", "difference", "metric", "score"),
    ]


def test_the_page_of_a_regression(tmp_path: Path) -> None:
    """Differences by hand: fedit 0.2 - 0.25. Sample standard deviation of 0.1 and 0.3: 0.2 / sqrt 2 = 0.141."""
    asked = plan(seed=[0, 1])
    grid, folder = expand(asked), Folder(tmp_path)
    for cell in grid.cells:
        error = {("fedit", 0): 0.1, ("fedit", 1): 0.3, ("fedavg", 0): 1234.5, ("fedavg", 1): 1234.5}
        finish(folder, cell, error[cell.config.method.name, cell.config.seed], constant_mse=0.15, validation_mse=0.5)
    page = to_markdown(grid, asked, rows(grid, asked, folder), metrics(grid, folder))
    assert "4 of 4 runs done. Mean squared error (lower is better), of the round that validation chose." in page
    assert "| method | mean squared error | parameters up | MB up |" in page
    assert "| fedit | 0.2 ± 0.141 | 1,000 | 0.001 |" in page and "| fedavg | 1.23e+03 ± 0 |" in page
    assert "| always the mean of the training numbers | 0.15 |  |  |" in page
    assert "Pearson correlation:\n\n| method | Pearson correlation |" in page and "| fedit | 0.5 ± 0 |" in page
    assert "Validation mean squared error (lower is better):\n\n" in page
    assert "**No method does better than always answering the mean of the training numbers.**" in page
    assert (
        "Ours are between -0.05 and -0.05 in mean squared error from the published, 0.05 on average, over 1 settings: 0 above, "
        "1 below."
    ) in page
    assert "| fedit | 0.2 ± 0.141 | 0.25 ± 0.01 | -0.05 |" in page
    assert "ccuracy" not in page and "%" not in page


def test_a_lower_error_than_the_constant_answers_is_better(tmp_path: Path) -> None:
    grid, folder = expand(plan()), Folder(tmp_path)
    for cell in grid.cells:
        finish(folder, cell, 0.1, constant_mse=0.15)
    assert "No method" not in to_markdown(grid, plan(), rows(grid, plan(), folder), metrics(grid, folder))


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Recipe, Grid, Folder]:
    """Two methods in each of two tasks; one failed before it began."""
    asked = plan(task={"name": ["number_guessing", "text_classification"]})
    grid, folder = expand(asked), Folder(tmp_path)
    for cell in grid.cells:
        words = cell.config.task.name == "text_classification"
        if words or cell.config.method.name == "fedit":
            finish(folder, cell, 0.9 if words else 0.2, CLASSIFICATION if words else REGRESSION)
        else:
            folder.failed(cell, "no memory")
    return asked, grid, folder


def test_two_tasks_have_tables_of_their_own(mixed: tuple[Recipe, Grid, Folder], tmp_path: Path) -> None:
    asked, grid, folder = mixed
    write_results(grid, asked, folder)
    found = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(r["metric"], r["score"], r["mse"], r["accuracy"], r["status"]) for r in found] == [
        ("mse", 0.2, 0.2, None, "done"),
        ("accuracy", 0.9, None, 0.9, "done"),
        (None, None, None, None, "failed"),
        ("accuracy", 0.9, None, 0.9, "done"),
    ]
    assert [row["published_mse"] for row in found] == [0.25, None, None, None]
    page = (tmp_path / "results.md").read_text()
    assert "Mean squared error (lower is better), accuracy in %, after the last round" in page
    numbers, words = page.partition("Accuracy, in %:")[::2]
    assert (
        "Mean squared error (lower is better):" in numbers
        and "| method | name number_guessing | parameters up | MB up |" in numbers
    )
    assert "| fedit | 0.2 |" in numbers and "fedavg |" not in numbers
    assert "| method | name text_classification |" in words and "| fedavg | 90.0 |" in words and "Macro F1, in %:" in words


def test_a_run_without_a_score_is_in_the_table_without_one(tmp_path: Path) -> None:
    grid, folder = expand(plan()), Folder(tmp_path)
    finish(folder, grid.cells[0], None)
    (row,) = found = rows(grid, plan(), folder)
    assert (row["status"], row["score"], row["difference"]) == ("done", None, None)
    assert "| fedit |  | 1,000 |" in to_markdown(grid, plan(), found, metrics(grid, folder))


def shown(table: LiveTable) -> list[list[str]]:
    console = Console(width=120, record=True, file=StringIO())
    console.print(table.table())
    return [line.split() for line in console.export_text().splitlines()]


def test_the_live_table_names_the_metric_when_it_is_known(tmp_path: Path) -> None:
    grid, folder = expand(plan()), Folder(tmp_path)
    table = LiveTable(grid, folder, 1, quiet=False)
    assert shown(table)[0] == ["cell", "state", "round", "score", "left"]
    listener = table.follow(grid.cells[0])
    finish(folder, grid.cells[0], 0.125)
    listener.round({"round": 1, "score": 0.125})
    assert shown(table)[0][3:] == ["mean", "squared", "error", "left"] and "0.125" in shown(table)[1]


def test_the_live_table_of_two_tasks_has_scores(mixed: tuple[Recipe, Grid, Folder]) -> None:
    _, grid, folder = mixed
    head, *cells = shown(LiveTable(grid, folder, 1, quiet=False))[:5]
    assert head[3] == "score" and sorted(line[-1] for line in cells if "done" in line) == ["%", "%", "0.2"]


def test_published_numbers_have_a_column_for_the_score(tmp_path: Path) -> None:
    text = 'title = "Mine"\n[task]\nname = "number_guessing"\n[[method]]\nname = "fedit"\n'
    (tmp_path / "mine.toml").write_text('published = "theirs.csv"\n' + text)
    (tmp_path / "theirs.csv").write_text(PUBLISHED)
    assert recipe.read(str(tmp_path / "mine.toml"), None).published[0]["mse"] == 0.25
    (tmp_path / "theirs.csv").write_text("method.name,spread\nfedit,0.25\n")
    with pytest.raises(BadInput, match="each row needs a score, in a column by the name of its metric"):
        recipe.read(str(tmp_path / "mine.toml"), None)


def test_published_numbers_of_another_metric_are_found_before_anything_runs(bert_folder: Path, csv_folder: Path) -> None:
    tables = {"model": {"source": str(bert_folder)}, "data": {"source": str(csv_folder)}, "clients": {"count": 3, "rank": 2}}
    grid = expand(Recipe(Header(name="mine"), tables | {"method": {"name": "fedit"}}))
    check.check(grid, grid.cells, [{"method.name": "fedit", "accuracy": 50.0}, {"method.name": "fedavg", "mse": 1.0}])
    with pytest.raises(BadInput, match="the published numbers have no column 'accuracy'"):
        check.check(grid, grid.cells, [{"method.name": "fedit", "mse": 1.0}])
