"""`fedlora compare` and `fedlora report` as a user meets them."""

import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny

from fedlora.comparison import executor, run
from fedlora.report import html

Call = Callable[..., tuple[int, str, str]]
Save = Callable[..., str]


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Call the console script; returns (exit status, standard output, standard error)."""
    return tiny.console(monkeypatch, capsys, tmp_path)


def test_from_a_recipe_to_a_report(fedlora: Call, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = save(about="Tiny.", minutes=1, published="tiny.csv")
    (tmp_path / "tiny.csv").write_text("method.name,accuracy,spread,upload_params\nlora-a2,90.5,1.5,1e9\n")
    status, out, err = fedlora("compare", recipe)
    assert status == 0, err
    assert out.splitlines()[0] == "tiny: 2 runs; about 1 minute in all on 2 cores"
    assert out.splitlines()[1].startswith("1/2  lora-a2: done, accuracy ")
    folder = tmp_path / "compare" / "tiny"
    assert {"recipe.toml", "recipe.csv", "cells", "results.parquet", "results.md", "report.html", "figures"} <= {
        path.name for path in folder.iterdir()
    }
    assert pq.read_table(folder / "results.parquet")["published_accuracy"].to_pylist() == [0.905, None]
    HTMLParser().feed((folder / "report.html").read_text())
    # From here on pages without pictures, which take longer than all else.
    monkeypatch.setattr(html, "save", lambda picture, figures: None)
    monkeypatch.setattr(html, "inline", lambda picture, index: "")
    # Again: nothing to run. From the folder's own recipe: the same comparison.
    before = (folder / "results.parquet").read_bytes()
    status, out, _ = fedlora("compare", folder / "recipe.toml")
    assert status == 0 and out.splitlines()[0].startswith("tiny: 2 runs, 2 of them done already")
    assert (folder / "results.parquet").read_bytes() == before
    # The report alone, of the comparison and of runs.
    (folder / "report.html").unlink()
    assert fedlora("report", folder)[0] == 0 and (folder / "report.html").exists()
    status, out, err = fedlora("report", *sorted((folder / "cells").iterdir()), "--html", "both.html")
    assert status == 0 and out == "report: both.html\n" and Path("both.html").exists(), err
    # Another recipe must not mix with this one.
    (tmp_path / "other.toml").write_text(Path(recipe).read_text())
    status, _, err = fedlora("compare", "other.toml", "--out", folder)
    assert status == 2 and err == f"error: {folder} holds the comparison tiny, not other; use another --out\n"


def test_a_failed_cell_is_status_1(fedlora: Call, save: Save, bert_folder: Path, tmp_path: Path):
    shutil.copytree(bert_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    broken = {"name": "fedit", "with": {"model": {"source": str(tmp_path / "model")}}}
    status, out, _ = fedlora("compare", save(method=[broken]), "--out", "out")
    assert status == 1 and "0 of 1 runs done, 1 failed; no report" in out
    status, _, err = fedlora("report", "out")
    assert status == 2 and "no run is complete yet" in err


def test_a_cell_that_diverged_has_failed_and_is_never_the_most_accurate(fedlora: Call, save: Save, tmp_path: Path):
    train = {"rounds": 2, "batch_size": 8, "lr": [1e38, 5e-3]}
    status, out, _ = fedlora("compare", save(train=train, method=[{"name": "fedit"}]), "--out", "out", "--jobs", "1")
    assert status == 1 and "1 of 2 runs done, 1 failed" in out
    page, table = ((tmp_path / "out" / name).read_text() for name in ("report.html", "results.md"))
    assert "finite; a lower train.lr may help" in page and "finite; a lower train.lr may help" in table
    assert "lr 1e+38: failed" in out and "1e+38 reaches" not in page and "1e+38 with" not in page


@pytest.mark.parametrize(
    "changes, args, said",
    [
        ({"trian": {"lr": 1}}, [], "unknown config key 'trian'"),
        ({"seed": []}, [], "seed = [] is an empty list, so the grid has no cells"),
        ({"clients": {"count": 3, "rank": "tiers"}}, [], "fedit: FedIT (FL+LoRA) needs one rank for all clients"),
        ({}, ["--set", "train.lr=[]"], "train.lr = [] is an empty list"),
        ({}, ["--set", "train.epoch=1"], "did you mean train.epochs"),
        ({}, ["--scale", "paper"], "has no table [paper]; it has no scales"),
        ({}, ["--scale", "tiny"], "unknown --scale 'tiny'; possible: paper, small"),
        ({"splits": {}}, [], "a recipe with [splits] runs nothing"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    fedlora: Call, save: Save, tmp_path: Path, changes: dict, args: list[str], said: str
):
    recipe = save(**changes)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = fedlora("compare", recipe, *args)
    assert status == 2 and out == "" and err.count("\n") == 1 and said in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_recipe_or_no_comparison(fedlora: Call, save: Save, tmp_path: Path):
    status, _, err = fedlora("compare")
    assert status == 2 and "no recipe" in err
    status, _, err = fedlora("compare", "tabel4")
    assert status == 2 and "did you mean table4" in err
    status, _, err = fedlora("run", save())
    assert status == 2 and "several runs; start it with: fedlora compare" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    status, _, err = fedlora("compare", save(), "--out", "mine")
    assert status == 2 and "mine is not empty and holds no comparison" in err
    status, _, err = fedlora("report", "mine")
    assert status == 2 and "mine" in err


def test_stopped_by_hand_says_how_to_go_on(fedlora: Call, save: Save, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "play", interrupt)
    recipe = save()
    status, _, err = fedlora("compare", recipe, "--jobs", 3, "--out", "my out")
    assert status == 130
    assert err == f"stopped; what is complete is kept; go on with: fedlora compare {recipe} --jobs 3 --out 'my out'\n"


def test_the_list_names_every_packaged_comparison(fedlora: Call):
    from fedlora.comparison.recipe import packaged

    status, out, _ = fedlora("compare", "--list")
    assert status == 0 and "demo" not in out
    for name in packaged():
        assert f"\n{name}  " in f"\n{out}"
    assert "--scale small: " in out and " in all on 2 cores" in out


@pytest.mark.parametrize(("gpu", "threads", "jobs"), [(False, 1, 1), (False, 2, 2), (False, 64, 4), (True, 64, 1)])
def test_how_many_run_at_a_time_when_nobody_says(gpu: bool, threads: int, jobs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert executor.usual_jobs() == jobs


def test_a_folder_that_another_comparison_works_in_is_left_alone(fedlora: Call, save: Save, tmp_path: Path):
    from fedlora.disk import alone

    (tmp_path / "out").mkdir()
    recipe = save()
    with alone(tmp_path / "out"):
        status, _, err = fedlora("compare", recipe, "--out", "out")
    assert status == 2 and err == "error: out is being written by another process; wait for it, or use another --out\n"
