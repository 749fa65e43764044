"""The packaged comparisons: they can run, and the published numbers beside them belong to their cells and to the paper's shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers

from fedlora import methods
from fedlora.comparison import recipe, splits
from fedlora.comparison.grid import Cell, expand
from fedlora.comparison.recipe import Scale
from fedlora.models.slots import find_targets
from fedlora.runs.prepare import make_method
from fedlora.runs.roster import client_ranks

NAMES = ["digits", "fig3", "fig4", "fig5", "fig6", "fig7", "methods", "table1", "table2", "table3", "table4", "table5", "table6"]
GRIDS = [name for name in NAMES if name not in ("digits", "fig7", "table4", "table5")]
P = 12 * (4 * (768 + 768) + 2 * (768 + 3072))  # parameters of a rank of RoBERTa-base's 72 layers, both factors
MINILM = 6 * (4 * (384 + 384) + 2 * (384 + 1536))
TURNS = 30 * 50  # clients and rounds of the paper


def grid(name: str, scale: Scale) -> tuple[Cell, ...]:
    return expand(recipe.read(name, scale)).cells


def test_these_are_all():
    assert recipe.packaged() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_and_how_long_it_takes(name):
    said = recipe.read(name, Scale.SMALL).header
    assert said.title and said.about and said.minutes is not None and said.minutes <= 90
    assert recipe.scales(name) == [Scale.SMALL, Scale.PAPER]


@pytest.mark.parametrize("name", GRIDS)
def test_the_small_scale_is_for_the_packaged_model_and_the_other_the_papers(name):
    for cell in grid(name, Scale.SMALL):
        make_method(cell.config)
        assert cell.config.model.source == "minilm" and cell.config.seed == 0
    for cell in grid(name, Scale.PAPER):
        make_method(cell.config)
        config = cell.config
        once = config.method.name == "fedavg" and name == "methods"  # a round of it is more than the others' run
        assert (config.model.source, config.train.rounds, config.train.epochs) == ("FacebookAI/roberta-base", 1 if once else 50, 5)
        assert config.clients.count == (20 if config.data.partition.value == "pathological" else 30)
        assert config.data.limit is None and config.train.optimizer == "adamw"


def test_the_small_table_1_is_eighteen_cells():
    cells = grid("table1", Scale.SMALL)
    assert len(cells) == 18 and len({cell.config.method.name for cell in cells[:5]}) == 5
    assert {(c.config.data.alpha, c.config.clients.rank) for c in cells} == {(a, r) for a in (0.5, 0.01) for r in (8, 1)}


@pytest.mark.parametrize("name, numbers", [("table1", 102), ("table2", 18), ("table3", 6), ("table6", 16)])
def test_every_published_number_is_one_cell_of_the_papers_scale(name, numbers):
    published = recipe.read(name, Scale.PAPER).published
    keys = [key for key in published[0] if "." in key]
    rows = [tuple(row[key] for key in keys) for row in published]
    cells = {tuple(cell.flat[key] for key in keys) for cell in grid(name, Scale.PAPER) if cell.flat["method.name"] != "raflora"}
    assert len(rows) == len(set(rows)) == numbers and set(rows) == cells
    assert all(10 < float(row["accuracy"]) < 100 for row in published)


def uploads(name: str) -> list[tuple[str, str, float]]:
    return [(r["method.name"], r["clients.rank"], float(r["upload_params"])) for r in recipe.read(name, Scale.PAPER).published]


def test_published_uploads_of_table_1_are_those_of_the_papers_shapes():
    """To three digits, but that the paper has 0.991B for what its shapes make 0.995B. LoRA-A²'s lie between the shortest and the
    longest choice: 768 values for each of r 72 vectors, and all 3072-long ones first."""
    for method, rank, params in uploads("table1"):
        r = int(rank)
        if method == "lora-a2":
            longest = 12 * min(6 * r, 16) * 3072 + (72 * r - 12 * min(6 * r, 16)) * 768
            assert 768 * 72 * r * TURNS <= params <= longest * TURNS
        else:
            whole = {"fedavg": 124_055_040, "ffa-lora": r * P / 2}.get(method, r * P)
            assert params == pytest.approx(whole * TURNS, rel=5e-3)


def test_published_uploads_of_table_3_are_shares_of_long_vectors_that_the_small_scale_can_have():
    """Each client's 2 * 72 vectors a round have 768 or 3072 values, of which 16 * 12 are there to choose; in MiniLM a half of both.
    So uploads over the most that there can be do not depend on the model."""
    most = 2 * 72 * 3072 * TURNS
    shares = {
        r["method.criterion"]: (float(r["upload_params"]) / most - 1 / 4) / (3 / 4)
        for r in recipe.read("table3", Scale.PAPER).published
    }
    assert shares == pytest.approx({"magnitude": 0.975, "contribution": 0.685, "sensitivity": 0.099}, abs=1e-3)
    assert 2 * 72 <= 16 * 12 and 2 * 36 <= 16 * 6
    (small,) = {(c.config.clients.count, c.config.train.rounds, c.config.clients.rank) for c in grid("table3", Scale.SMALL)}
    assert small[1] % 2 == 0 and small[2] == 2  # as many rounds of B as of A
    assert (recipe.read("table3", Scale.SMALL).header.minutes or 99) <= 20


def test_the_small_table_2_is_one_plan_of_ranks_and_what_differs_from_flexlora_apart():
    cells = [cell.flat for cell in grid("table2", Scale.SMALL)]
    assert {(cell["data.alpha"], cell["clients.rank"]) for cell in cells} == {(0.01, "tiers")}
    assert sorted((cell["method.name"], cell.get("method.scale")) for cell in cells) == [
        ("flexlora", None),
        ("hetlora", None),
        ("lora-a2", None),
        ("raflora", "one-scale"),
        ("raflora", "own-scale"),
    ]


def test_published_uploads_of_table_2_are_those_of_the_plans_of_ranks():
    for cell in grid("table2", Scale.PAPER):
        plan = cell.flat["clients.rank"]
        whole = sum(client_ranks(cell.config.clients, 30)) * P * 50
        for method, ranks, params in uploads("table2"):
            if ranks == plan and method != "lora-a2":
                assert params == pytest.approx(whole, rel=5e-3)


@pytest.mark.parametrize("name", ["table4", "table5", "fig7"])
def test_recipes_of_splits(name):
    asked = splits.read(recipe.read(name, Scale.SMALL).splits or {})
    assert sum(len(each.train) + len(each.test) for each in asked.published) == (0 if name == "fig7" else 24)
    assert asked.alpha == [0.01, 0.1, 0.5] and asked.clients == 30


@pytest.mark.parametrize("scale, kind, layers", [(Scale.SMALL, "bert", 6), (Scale.PAPER, "roberta", 12)])
def test_figure_5_adapts_each_type_of_module_and_each_layer_once(scale, kind, layers):
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 10}
    config = transformers.AutoConfig.for_model(kind, num_hidden_layers=layers, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    everything, *rest = [
        find_targets(model, cell.config.model.target_modules) for cell in sorted(grid("fig5", scale), key=by_place)
    ]
    types, by_layer = rest[:6], rest[6:]
    assert [len(found) for found in types] == [layers] * 6 and [len(found) for found in by_layer] == [6] * layers
    for parts in (types, by_layer):
        assert sorted(path for found in parts for path in found) == sorted(everything)


def by_place(cell: Cell) -> int:
    return cell.place


@pytest.mark.parametrize("scale", list(Scale))
def test_digits_set_a_fixed_adapter_beside_one_that_is_merged_in_all_else_alike(scale):
    cells = grid("digits", scale)
    for cell in cells:
        make_method(cell.config)
        assert (cell.config.task.name, cell.config.model.source, cell.config.data.source) == (
            "image_classification",
            "mlp",
            "digits",
        )
    apart = {"method.name", "method.accumulate"}
    places = [
        {tuple((k, str(v)) for k, v in cell.flat.items() if k not in apart) for cell in cells if said(cell) == wanted}
        for wanted in (("fedit", None), ("fedloru", None), ("fedloru", "literal"))
    ]
    assert places[0] == places[1] == places[2] and len(places[0]) == (6 if scale is Scale.SMALL else 12)
    assert {cell.config.seed for cell in cells} == {0, 1, 2} and {cell.config.clients.count for cell in cells} == {20, 100}


def said(cell: Cell) -> tuple[str, str | None]:
    return cell.flat["method.name"], cell.flat.get("method.accumulate")


# ---- every method at equal upload bytes --------------------------------------------------------------------------------------


def mixtures(hidden: int) -> float:
    """CE-LoRA's statistics of at most 77 classes, sent once."""
    return 77 * 3 * (2 * hidden + 1) + 77


def upload(name: str, r: int, p: int, rounds: int, modules: int, hidden: int) -> float:
    """Values that a client of rank r uploads in a round, a mean over the rounds, by the papers' formulas; an index costs 1/32."""
    pair = float(r * p)
    formulas: dict[str, Callable[[], float]] = {
        "ffa-lora": lambda: pair / 2,
        "rolora": lambda: pair / 2,
        "fedsvd": lambda: pair / 2,
        "fedsa-lora": lambda: pair / 2,
        "flasc": lambda: pair / 4 + pair / 32,
        "ce-lora": lambda: modules * r**2 + mixtures(hidden) / rounds,
        "ravan": lambda: 4 * modules * r**2,
        "fed-sb": lambda: (pair + (rounds - 1) * modules * r**2) / rounds,
        "fedlease": lambda: pair + 7 * p / 2,  # four experts: a router of seven rows of d_in
        # The longest choice there is: all 24 ranks of the layers of 4 d first, the rest of d.
        "lora-a2": lambda: modules / 6 * 24 * 4 * hidden + (modules * r - modules / 6 * 24) * hidden,
        # A hundredth of the 12 d^2 weights of a block, whose p is 18 d, in the first tenth of the rounds.
        "slora": lambda: (rounds // 10 * 0.01 * p * hidden * 12 / 18 + (rounds - rounds // 10) * pair) / rounds,
    }
    return formulas.get(name, lambda: pair)()


@pytest.mark.parametrize(
    "scale, rounds, p, modules, hidden", [(Scale.SMALL, 12, MINILM, 36, 384), (Scale.PAPER, 50, P, 72, 768)], ids=["small", "paper"]
)
def test_each_methods_rank_is_the_largest_that_fits_the_budget(scale, rounds, p, modules, hidden):
    cells = [cell for cell in grid("methods", scale) if cell.config.seed == 0]
    assert sorted(cell.config.method.name for cell in cells) == methods.names()
    for cell in cells:
        name, rank = cell.config.method.name, cell.config.clients.rank
        assert isinstance(rank, int)
        if name == "fedavg":
            assert cell.config.train.rounds == 1
        elif name == "fedhm":
            assert round(cell.flat["method.rank_share"] * hidden) == round(cell.flat["method.least_share"] * hidden) == rank == 8
        else:
            assert cell.config.train.rounds == rounds
            assert upload(name, rank, p, rounds, modules, hidden) <= 8 * p, name
            assert upload(name, rank + 1, p, rounds, modules, hidden) > 8 * p, name
