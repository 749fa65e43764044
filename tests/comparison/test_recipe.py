"""Recipes: scales, settings, what they say about themselves, published numbers."""

from pathlib import Path

import pytest

from fedlora.comparison import recipe
from fedlora.comparison.grid import expand
from fedlora.comparison.recipe import Scale
from fedlora.errors import BadInput
from fedlora.tables import setting

TEXT = """
title = "Two sizes"
about = "One line."
seed = [0, 1]
[data]
source = "banking77"
alpha = [0.5, 0.01]
[[method]]
name = "fedit"
[[method]]
name = "lora-a2"
with = { train = { lr = 1e-3 } }
[small]
minutes = 80
seed = 0
train = { rounds = 6 }
[paper]
[paper.model]
source = "FacebookAI/roberta-base"
[[paper.method]]
name = "fedavg"
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.toml").write_text(TEXT)
    return str(tmp_path / "mine.toml")


def test_a_scale_is_laid_over_the_recipe(file: str):
    small, paper = recipe.read(file, Scale.SMALL), recipe.read(file, Scale.PAPER)
    assert recipe.read(file, None) == small
    assert (small.header.name, small.header.title, small.header.scale, small.header.minutes) == ("mine", "Two sizes", "small", 80.0)
    assert paper.header.minutes is None
    cells = expand(small).cells
    assert len(cells) == 4 and {cell.config.train.rounds for cell in cells} == {6}
    cells = expand(paper).cells
    assert len(cells) == 4 and {cell.config.method.name for cell in cells} == {"fedavg"}
    assert {cell.config.model.source for cell in cells} == {"FacebookAI/roberta-base"}


def test_settings_are_laid_over_the_scale_and_may_be_grids(file: str):
    plan = recipe.read(file, None, [setting("train.rounds=[1,2,3]"), setting("data.alpha=1")])
    assert len(expand(plan).cells) == 2 * 3
    with pytest.raises(BadInput, match="lists its methods"):
        recipe.read(file, None, [setting("method.name=fedavg")])


def test_what_is_left_in_the_folder_is_the_same_recipe(file: str, tmp_path: Path):
    small = recipe.read(file, None, [setting("train.epochs=2")])
    (tmp_path / "recipe.toml").write_text(small.to_toml())
    again = recipe.read(str(tmp_path / "recipe.toml"), None)
    assert again == small
    assert [cell.hash for cell in expand(again).cells] == [cell.hash for cell in expand(small).cells]


def test_published_numbers_stand_beside_the_recipe(file: str, tmp_path: Path):
    (tmp_path / "mine.csv").write_text("text,label\n")  # data of the same name is not taken for it
    assert recipe.read(file, None).published == ()
    Path(file).write_text('published = "mine.csv"\n' + TEXT)
    (tmp_path / "mine.csv").write_text("method.name,clients.rank,accuracy,spread,upload_params\nfedavg,,82.5,1.2,186e9\n")
    (row,) = recipe.read(file, None).published
    assert row["accuracy"] == 82.5 and row["method.name"] == "fedavg" and "clients.rank" not in row
    small = recipe.read(file, None)
    (tmp_path / "recipe.toml").write_text(small.to_toml())
    (tmp_path / "recipe.csv").write_text(small.csv)
    assert recipe.read(str(tmp_path / "recipe.toml"), None).published == small.published
    (tmp_path / "mine.csv").write_text("method.name,acuracy\nfedavg,82.5\n")
    with pytest.raises(BadInput, match="accuracy"):
        recipe.read(file, None)


def test_packaged_comparisons_are_those_with_a_title():
    assert "demo" not in recipe.packaged()
    for name in recipe.packaged():
        for scale in recipe.scales(name):
            plan = recipe.read(name, scale)
            assert plan.header.title and plan.header.about
            assert plan.splits is not None or expand(plan).cells


@pytest.mark.parametrize(
    "text, scale, said",
    [
        ("seed = 1", Scale.PAPER, "has no table [paper]; it has no scales"),
        ("small = {}", Scale.PAPER, "possible: small"),
        ("small = 3", None, "small = 3 is no table"),
        ("splits = 3", None, "splits = 3 is no table"),
        ("title = 3", None, "title = 3"),
        ("published = 'nowhere.csv'", None, "published = 'nowhere.csv': there is no such file beside the recipe"),
        ("minutes = 'long'", None, "minutes = 'long'"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, text: str, scale: Scale | None, said: str):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(BadInput) as error:
        recipe.read(str(tmp_path / "bad.toml"), scale)
    assert said in str(error.value) and "\n" not in str(error.value)
