"""Runs of any task: a page speaks of their own metrics, by name, unit and direction, and ranks nothing that cannot be. By hand."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedlora.report import html
from fedlora.report.answers import answers
from fedlora.report.contenders import Contender, by_place, contenders
from fedlora.report.picture import Panel, Picture
from fedlora.report.plots import ablation, classes, clients, frontier, metrics, published, score
from fedlora.report.plots.lines import limits
from fedlora.report.runs import Comparison, Run, comparison, read
from fedlora.report.summary import answer_table, lead, notes, results
from fedlora.report.units import least, worth
from fedlora.report.words import one
from fedlora.tasks.metrics import CLASSIFICATION, Metric

MSE = Metric("mse", "mean squared error", "", "lower", "constant_mse", "the mean of the training numbers")
REGRESSION = (MSE, Metric("mae", "mean absolute error", "K", "lower"), Metric("pearson", "Pearson correlation", ""))
Write = Callable[..., Path]
Make = Callable[..., Run]


@pytest.fixture
def make(write: Write, tmp_path: Path) -> Make:
    """A run of a regression that nobody has played: mean squared errors by round; mae is ten times the error, pearson 1 less it."""

    def make(
        method: str, errors: Sequence[float | None], upload: int = 10**6, row: Any = None, alpha: float = 0.5, **more: Any
    ) -> Run:
        tables = {
            "method": {"name": method},
            "task": {"name": "number_guessing"},
            "data": {"alpha": alpha},
            **more.pop("tables", {}),
        }
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        rows = [{"metric": "mse", "score": x, "mse": x, "mae": x and 10 * x, "pearson": x and 1 - x, **(row or {})} for x in errors]
        write(folder, tables, [None] * len(errors), upload, rows, label_names=(), **more)
        declare(folder, REGRESSION)
        return read(folder)

    return make


def declare(folder: Path, metrics: Sequence[Metric]) -> None:
    """What a run of another task says in its folder."""
    federation = json.loads((folder / "federation.json").read_text())
    (folder / "federation.json").write_text(json.dumps(federation | {"metrics": [metric.as_json() for metric in metrics]}))


def found(*runs: Run) -> tuple[Contender, ...]:
    return contenders(comparison(runs))


def lines(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    axes = Figure(figsize=panel.size).subplots()
    panel.draw(axes)
    shown = [line for line in axes.get_lines() if line.get_label()[0] != "_"]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in shown}


def only(picture: Picture | None) -> Picture:
    assert picture is not None
    return picture


def test_the_lower_error_is_the_better(make: Make) -> None:
    """0.19 / 0.95 = 0.2: FedIT gets there in round 2 after 4 MB, LoRA-A² ends at 0.2 after 3 MB."""
    here = found(make("lora-a2", [0.5, 0.3, 0.2]), make("fedit", [0.4, 0.195, 0.19], 2 * 10**6))
    (answer,) = answers(here)
    assert [contender.name for contender in answer.contenders] == ["FedIT", "LoRA-A²"]
    assert (answer.target, answer.goal) == (0.2, "0.2")
    assert [(contender.name, cost) for contender, cost in answer.reached] == [("LoRA-A²", 3e6), ("FedIT", 4e6)]
    assert answer.noise == 0
    assert lead(here) == (
        "Best by mean squared error (lower is better): FedIT with 0.19, then LoRA-A² with 0.2. "
        "Fewest bytes to reach 0.2: LoRA-A² with 3 MB uploaded; FedIT needs 4 MB."
    )
    table = answer_table(here)
    assert table is not None
    assert table.header == ("best", "mean squared error", "to reach", "fewest bytes", "uploaded")
    assert table.rows == (("FedIT", "0.19", "0.2", "LoRA-A²", "3 MB"),)
    assert table.caption.startswith("The best by final mean squared error (lower is better)")
    (table,) = results(here)
    assert table.header[1:5] == (
        "20newsgroups Dir(0.5)",
        "mean absolute error, K",
        "Pearson correlation",
        "upload to 0.2",
    )
    assert [row[:5] for row in table.rows] == [("FedIT", "0.19", "1.9", "0.81", "4 MB"), ("LoRA-A²", "0.2", "2", "0.8", "3 MB")]
    assert not any("test set's size" in note for note in notes(comparison([run for c in here for run in c.runs]), here))


def test_the_frontier_goes_down(make: Make) -> None:
    """FlexLoRA uploads more than LoRA-A² and is worse; FedAvg uploads most and is best."""
    sizes = {"lora-a2": (0.5, 1), "flexlora": (0.6, 2), "fedit": (0.4, 3), "fedavg": (0.1, 100)}
    picture = only(frontier.picture(found(*[make(name, [x], size * 10**6) for name, (x, size) in sizes.items()])))
    assert picture.finding == "On the frontier: LoRA-A², FedIT and FedAvg"
    assert "Down and left is better" in picture.about and picture.about.endswith("nothing is better.")
    assert {row[1]: row[-2:] for row in picture.tables[0].rows}["FlexLoRA"] == ("0.6", "")
    assert picture.tables[0].header[-2] == "mean squared error"
    assert lines(picture.panels[0])["FedAvg"] == ([100], [0.1])


def test_nothing_beats_the_constant_answer(make: Make) -> None:
    row = {"constant_mse": 0.3}
    one, two = make("fedit", [0.3], row=row), make("lora-a2", [0.4], row=row)
    assert lead(found(one, two)) == (
        "No method does better than the mean of the training numbers: always answering it has 0.3 in mean squared error (lower is "
        "better), and the best, FedIT, 0.3."
    )
    assert lead(found(one)) == (
        "FedIT reaches 0.3 in mean squared error (lower is better) after 1 round and 1 MB of uploads. That is no better than the "
        "mean of the training numbers: always answering it has 0.3 in mean squared error (lower is better)."
    )
    (table,) = results(found(one, two))
    assert table.rows[-1][:2] == ("always the mean of the training numbers", "0.3")
    assert lead(found(make("fedit", [0.299], row=row))).endswith("of uploads.")


def test_equal_as_shown_is_a_tie(make: Make) -> None:
    """Three digits are shown: 0.2001 and 0.2004 are 0.2; the spread is over seeds, in the metric's unit."""
    assert lead(found(make("fedit", [0.2001]), make("lora-a2", [0.2004], 2 * 10**6))).startswith(
        "Equally good by mean squared error (lower is better): LoRA-A² and FedIT with 0.2."
    )
    seeds = found(*[make("fedit", [x], tables={"seed": i}) for i, x in enumerate((0.1, 0.2))])
    assert str(seeds[0].final()) == "0.15 ± 0.0707"  # sample: 0.1 / sqrt 2
    assert str(seeds[0].final("mae", REGRESSION[1])) == "1.5 ± 0.707"
    assert seeds[0].final("mae", REGRESSION[1]).whole == "1.5 ± 0.707 K"  # type: ignore[union-attr]


def test_all_metrics_side_by_side(make: Make) -> None:
    one = make("fedit", [0.5, 0.25])
    picture = only(metrics.picture(found(one)))
    assert (
        picture.finding == "FedIT ends at 0.25 in mean squared error, 2.5 K in mean absolute error and 0.75 in Pearson correlation"
    )
    assert [panel.heading for panel in picture.panels] == [
        "Mean squared error (lower is better)",
        "Mean absolute error (lower is better)",
        "Pearson correlation",
    ]
    assert [lines(panel)["FedIT"][1] for panel in picture.panels] == [[0.5, 0.25], [5, 2.5], [0.5, 0.75]]
    assert picture.tables[0].rows[1] == ("mean absolute error, K", "FedIT", "5", "2.5")
    other = make("lora-a2", [0.5, 0.2], row={"pearson": 0.1})
    assert only(metrics.picture(found(one, other))).finding == (
        "Best at the end by mean squared error: LoRA-A², by mean absolute error: LoRA-A², by Pearson correlation: FedIT"
    )
    assert metrics.picture(found(replace(one, metrics=(MSE,)))) is None


def test_every_metric_is_shown_in_its_own_unit(make: Make) -> None:
    """A share beside an error, in one place and in tables of their own in two."""
    near = Metric("near", "guessed within 1 K")
    one, two = (replace(make("fedit", [0.25], row={"near": x}, alpha=a), metrics=(MSE, near)) for x, a in ((0.5, 0.5), (0.75, 0.1)))
    (table,) = results(found(one))
    assert table.header[1:3] == ("20newsgroups Dir(0.5)", "guessed within 1 K, %") and table.rows[0][1:3] == ("0.25", "50.0")
    _, table = results(found(one, two))
    assert table.header[1:] == ("Dir(0.5), %", "Dir(0.1), %") and table.rows == (("FedIT", "50.0", "75.0"),)


def test_curves_of_an_error(make: Make) -> None:
    """Of more lines than can be told apart, those of the largest errors are grey."""
    here = found(make("fedit", [0.5, None, 0.25]), make("lora-a2", [0.4, 0.3, 0.2]))
    by_round, by_upload = score.pictures(here)
    assert (by_round.name, by_upload.name) == ("mse-by-round", "mse-by-upload")
    assert by_round.finding == "LoRA-A² ends at 0.2 in mean squared error (lower is better), FedIT at 0.25"
    assert by_round.about == "Test mean squared error by round. Lower is better. One seed."
    assert by_round.tables[0].rows[1][2:] == ("0.5", "–", "0.25")
    assert by_upload.finding == "To reach 0.211, LoRA-A² uploads 3 MB; no other gets there"  # 0.2 / 0.95 = 0.2105…
    names = ("ce-lora", "fed-sb", "fedavg", "feddpa", "fedex-lora", "fedhm", "fedit", "fedlease", "fedloru", "fedsvd")
    axes = Figure().subplots()
    score.pictures(found(*[make(name, [0.05 * (1 + i)]) for i, name in enumerate(names)]))[0].panels[0].draw(axes)
    grey = [line.get_ydata()[0] for line in axes.get_lines() if line.get_gid() == "rest"]
    assert sorted(grey) == pytest.approx([0.45, 0.5])


def test_the_worst_clients_have_the_largest_errors(make: Make) -> None:
    own = {"client_mse": {"0": 0.1, "1": 0.4, "2": 0.2, "3": 0.3}}
    here = found(make("feddpa", [0.25], row=own))
    assert here[0].personal
    picture = only(clients.picture(here))
    assert picture.finding == "The worst tenth of FedDPA's clients has 0.4 in mean squared error (lower is better)"
    assert picture.tables[0].rows[0][2:] == ("0.4", "0.25", "0.1", "4")
    assert [row[2:] for row in picture.tables[1].rows] == [
        ("client 1", "0.4"),
        ("client 3", "0.3"),
        ("client 2", "0.2"),
        ("client 0", "0.1"),
    ]


def test_what_was_varied(make: Make) -> None:
    runs = [
        make(m, [x], alpha=a)
        for m, a, x in (("fedit", 0.5, 0.1), ("fedit", 0.1, 0.3), ("ffa-lora", 0.5, 0.2), ("ffa-lora", 0.1, 0.15))
    ]
    picture = only(ablation.heterogeneity(found(*runs)))
    assert picture.name == "mse-by-heterogeneity"
    assert picture.finding == "From Dir(0.5) to Dir(0.1) FFA-LoRA gets better by 0.05, FedIT gets worse by 0.2"
    assert "clients differ more" in picture.about  # there are no classes
    runs = [make("fedit", [x], tables={"model": {"target_modules": m}}) for m, x in (("query", 0.2), ("value", 0.1))]
    picture = only(ablation.places(found(*runs)))
    assert picture.finding == "Adapters in value reach 0.1, in query 0.2 in mean squared error (lower is better)"


def test_published_by_the_name_of_the_metric(make: Make) -> None:
    """0.21 is within 5 % of 0.2, 0.3 is not."""
    rows = [{"method.name": "fedit", "mse": 0.2, "spread": 0.01}, {"method.name": "lora-a2", "mse": 0.2, "accuracy": 99.0}]
    picture = only(published.picture(found(make("fedit", [0.21]), make("lora-a2", [0.3])), rows))
    assert picture.finding == ("1 of 2 cells are within 5 % of the published mean squared error; LoRA-A² differs most, by +0.1")
    assert [row[1:5] for row in picture.tables[0].rows] == [
        ("LoRA-A²", "0.3", "0.2", "+0.1"),
        ("FedIT", "0.21", "0.2 ± 0.01", "+0.01"),
    ]
    assert published.picture(found(make("fedit", [0.21])), [{"method.name": "fedit", "accuracy": 50.0}]) is None


@pytest.fixture
def mixed(make: Make, write: Write, tmp_path: Path) -> tuple[Run, ...]:
    """Two methods in each of two tasks on one source."""
    texts = [
        read(write(tmp_path / f"text-{name}", {"method": {"name": name}}, [x], 10**6))
        for name, x in (("fedit", 0.5), ("lora-a2", 0.6))
    ]
    return *texts, make("fedit", [0.2]), make("lora-a2", [0.3])


def test_two_tasks_are_never_ranked_with_each_other(mixed: tuple[Run, ...]) -> None:
    here = found(*mixed)
    assert list(by_place(here)) == ["number guessing", "text classification"]
    ranked = {answer.where: [contender.name for contender in answer.contenders] for answer in answers(here)}
    assert ranked == {"number guessing": ["FedIT", "LoRA-A²"], "text classification": ["LoRA-A²", "FedIT"]}
    assert lead(here).splitlines() == [
        "Best by mean squared error (lower is better): FedIT with 0.2, then LoRA-A² with 0.3. "
        "Fewest bytes to reach 0.211: FedIT with 1 MB uploaded; no other method gets there.",
        "Most accurate: LoRA-A² with 60.0 %, then FedIT with 50.0 %. "
        "Fewest bytes to reach 57 %: LoRA-A² with 1 MB uploaded; no other method gets there.",
    ]
    assert [(table.header[1], [row[:2] for row in table.rows]) for table in results(here)] == [
        ("number guessing", [("FedIT", "0.2"), ("LoRA-A²", "0.3")]),
        ("text classification, %", [("LoRA-A²", "60.0"), ("FedIT", "50.0")]),
    ]
    table = answer_table(here)
    assert table is not None
    assert table.header[:4] == ("data", "best", "by", "score")
    assert [row[1:5] for row in table.rows] == [
        ("FedIT", "mean squared error (lower is better)", "0.2", "0.211"),
        ("LoRA-A²", "accuracy", "60.0 %", "57 %"),
    ]
    assert {picture.name for picture in score.pictures(here)} == {
        f"{metric}-by-{side}" for metric in ("mse", "accuracy") for side in ("round", "upload")
    }


def test_runs_of_one_metric_in_two_tasks_have_places_of_their_own(write: Write, tmp_path: Path) -> None:
    runs = [read(write(tmp_path / name, {"task": {"name": name}}, [0.5])) for name in ("texts", "pictures")]
    assert [[c.where for c in answer.contenders] for answer in answers(found(*runs))] == [["pictures"], ["texts"]]


def draw(runs: Sequence[Run], folder: Path, rows: Sequence[Mapping[str, Any]] = ()) -> str:
    shown: Comparison = comparison(runs, "Title", published=rows)
    html.write(html.of_comparison(shown), folder / "report.html", folder / "figures")
    return (folder / "report.html").read_text()


def names(folder: Path) -> set[str]:
    return {file.stem for file in (folder / "figures").iterdir()}


def test_the_page_of_a_regression(make: Make, tmp_path: Path) -> None:
    row = {"client_mse": {"0": 0.1, "1": 0.4}, "constant_mse": 0.9, "validation_mse": 0.3}
    runs = [make(m, x, u, row) for m, x, u in (("fedit", [0.5, 0.2], 2 * 10**6), ("lora-a2", [0.6, 0.3], 10**6))]
    text = draw(runs, tmp_path / "out", [{"method.name": "fedit", "mse": 0.25}])
    assert names(tmp_path / "out") == {
        *("frontier", "mse-by-round", "mse-by-upload", "metrics-by-round", "published", "clients", "time"),
    }
    for heading in ("Mean squared error by round and by upload", "All metrics by round", "Fairness over clients"):
        assert f"<h2>{heading}</h2>" in text
    assert "ccura" not in text and "macro F1" not in text and "class" not in text.split("</style>")[1].replace('class="', "")
    assert classes.picture(found(*runs)) is None


def test_the_page_of_two_tasks(mixed: tuple[Run, ...], tmp_path: Path) -> None:
    text = draw(mixed, tmp_path / "out")
    assert names(tmp_path / "out") == {
        *("frontier-mse", "mse-by-round", "mse-by-upload", "metrics-by-round-mse"),
        *("frontier-accuracy", "accuracy-by-round", "accuracy-by-upload", "metrics-by-round-accuracy", "time"),
    }
    ids = [part.partition('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_without_a_score_the_loss_is_drawn(make: Make, tmp_path: Path) -> None:
    """The fixture's loss is 1 / round; a round without a loss is left out."""
    runs = [make("fedit", [None] * 4), make("lora-a2", [None] * 4, row={"loss": 0.5})]
    picture = only(score.losses(found(*runs)))
    assert (picture.name, picture.finding) == (
        "training-loss-by-round",
        "The training loss of FedIT ends at 0.25, of LoRA-A² at 0.5",
    )
    assert lines(picture.panels[0])["FedIT"] == ([1, 2, 3, 4], pytest.approx([1, 1 / 2, 1 / 3, 1 / 4]))
    assert "Lower is better." in picture.about
    assert score.pictures(found(*runs)) == [] and answers(found(*runs)) == []
    text = draw(runs, tmp_path / "out")
    assert names(tmp_path / "out") == {"training-loss-by-round", "time"}
    assert "No round was scored, so runs are not ranked." in text and "not scored" in text
    assert score.losses(found(make("fedit", [None, 0.5]))) is None
    some = found(make("fedit", [0.5]), make("lora-a2", [None]))
    assert list(lines(only(score.losses(some)).panels[0])) == ["LoRA-A²"]
    assert score.losses(found(make("fedit", [None], row={"loss": None}))) is None


@pytest.mark.parametrize(
    ("metric", "best", "target"),
    [
        (CLASSIFICATION[0], 80.0, 76.0),
        (CLASSIFICATION[0], 33.84, 32.0),
        (replace(CLASSIFICATION[0], better="lower"), 4.2, 4.5),  # 4.42 and up
        (MSE, 0.19, 0.2),
        (MSE, 0.1234, 0.13),  # 0.12989
        (MSE, 1234.0, 1300.0),  # 1298.9
        (MSE, 0.0, 0.0),
        (MSE, -2.0, -1.9),
        (REGRESSION[2], 0.81, 0.769),  # 0.7695
        (REGRESSION[2], -0.5, -0.527),  # -0.5263
    ],
)
def test_near_to_the_best(metric: Metric, best: float, target: float) -> None:
    """95 % of what is to be high, 1 / 0.95 of what is to be low, to the worse side."""
    assert least(metric, best, 0.95) == target


def test_worth() -> None:
    assert worth(MSE, 0.1) > worth(MSE, 0.2) and worth(REGRESSION[2], 0.1) < worth(REGRESSION[2], 0.2)
    assert worth(MSE, 0.10001) == worth(MSE, 0.1) and worth(CLASSIFICATION[0], 33.84) == worth(CLASSIFICATION[0], 33.76)


def test_limits_of_an_axis() -> None:
    assert limits([3.0, 22.0], "%") == (0, 30)
    assert limits([], "") == (0, 1)
    assert limits([0.2, 1.0], "") == (0, pytest.approx(1.048))
    assert limits([0.9, 1.0], "K") == (pytest.approx(0.894), pytest.approx(1.006))
    low, high = limits([2.0, 2.0], "")
    assert low < 2 < high
    assert np.isfinite(limits([0.0], "")).all()


def test_one_of_a_kind() -> None:
    kinds = ("classes", "lengths", "domains", "clusters", "values of 'teams'", "tenths of the numbers")
    assert [one(kind) for kind in kinds] == ["class", "length", "domain", "cluster", "value of 'teams'", "tenth of the numbers"]
