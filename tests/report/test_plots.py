"""What is drawn is what the tables say, and the titles say what the numbers do."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedlora.report.contenders import Contender, contenders
from fedlora.report.picture import Panel, Picture
from fedlora.report.plots import ablation, clients, clock, discordance, energy, frontier, published, ranks, score, similarity
from fedlora.report.plots.lines import percent_limits
from fedlora.report.runs import comparison, read

Write = Callable[..., Path]


def drawn(panel: Panel) -> Any:
    axes = Figure(figsize=panel.size).subplots()
    panel.draw(axes)
    return axes


def lines(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> (x, y) of every line that has one."""
    found = drawn(panel).get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in found if line.get_label()[0] != "_"}


def only(picture: Picture | None) -> Picture:
    assert picture is not None
    return picture


@pytest.fixture
def make(write: Write, tmp_path: Path) -> Callable[..., tuple[Contender, ...]]:
    """Cells of runs: keywords of `write_run` each."""

    def make(*runs: Mapping[str, Any]) -> tuple[Contender, ...]:
        return contenders(comparison([read(write(tmp_path / str(i), **run)) for i, run in enumerate(runs)]))

    return make


def run(method: str, accuracy: Sequence[float | None], alpha: float = 0.5, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"tables": {"method": {"name": method}, "data": {"alpha": alpha}, "seed": seed}, "accuracy": accuracy, **more}


def test_accuracy_by_round_and_by_upload(make: Any) -> None:
    found = make(run("fedit", [0.1, None, 0.5], upload=2_000_000), run("lora-a2", [0.2, 0.3, 0.75], upload=1_000_000))
    by_round, by_upload = score.pictures(found)
    assert by_round.finding == "LoRA-A² ends at 75.0 %, FedIT at 50.0 %"
    assert lines(by_round.panels[0]) == {
        "LoRA-A²": ([1, 2, 3], pytest.approx([20, 30, 75])),
        "FedIT": ([1, 3], pytest.approx([10, 50])),
    }
    assert lines(by_upload.panels[0])["FedIT"][0] == pytest.approx([2, 6])
    assert by_upload.finding == "To reach 71 %, LoRA-A² uploads 3 MB; no other gets there"
    place = "20newsgroups Dir(0.5)"
    (table,) = by_round.tables
    assert table.header == ("data", "method", "round 1", "round 2", "round 3")
    assert table.rows == ((place, "LoRA-A²", "20.0", "30.0", "75.0"), (place, "FedIT", "10.0", "–", "50.0"))
    assert by_upload.tables[0].rows[1] == (place, "FedIT", "2.000", "–", "6.000", "1.5 M")


def test_a_band_from_the_lowest_to_the_highest_seed(make: Any) -> None:
    found = make(run("fedit", [0.1, 0.2]), run("fedit", [0.3, 0.6], seed=1))
    picture = score.pictures(found)[0]
    (band,) = drawn(picture.panels[0]).collections
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(10)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(60)
    assert "means over 2 seeds" in picture.about
    assert picture.tables[0].rows[0][2:] == ("20.0 (10.0 to 30.0)", "40.0 (20.0 to 60.0)")


def test_more_lines_than_can_be_told_apart_are_grey(make: Any) -> None:
    names = ("ce-lora", "fed-sb", "fedavg", "feddpa", "fedex-lora", "fedhm", "fedit", "fedlease", "fedloru", "fedsvd")
    found = make(*[run(name, [0.05 * i]) for i, name in enumerate(names)])
    axes = drawn(score.pictures(found)[0].panels[0])
    grey = [line for line in axes.get_lines() if line.get_gid() == "rest"]
    assert sorted(line.get_ydata()[0] for line in grey) == pytest.approx([0, 5])
    assert len(axes.texts) == 8


def test_nothing_scored_nothing_drawn(make: Any) -> None:
    found = make(run("fedit", [None, None]))
    assert score.pictures(found) == []
    assert [plot.picture(found) for plot in (frontier, clients, discordance, energy)] == [None] * 4
    assert [*ranks.pictures(found), *similarity.pictures(found)] == []
    assert ablation.heterogeneity(found) is None
    assert ablation.places(found) is None
    assert published.picture(found, ()) is None


def test_a_method_that_uploads_nothing_has_a_linear_axis(make: Any) -> None:
    found = make(run("fedit", [0.1, 0.2], upload=0), run("lora-a2", [0.1, 0.2]))
    assert drawn(score.pictures(found)[1].panels[0]).get_xscale() == "linear"
    assert drawn(only(frontier.picture(found)).panels[0]).get_xscale() == "linear"


def test_the_frontier(make: Any) -> None:
    """fedit is beaten: flexlora uploads less and is as good."""
    sizes = {"lora-a2": (0.4, 1), "flexlora": (0.5, 2), "fedit": (0.5, 3), "fedavg": (0.9, 100)}
    found = make(*[run(name, [value], upload=size * 1_000_000) for name, (value, size) in sizes.items()])
    picture = only(frontier.picture(found))
    assert picture.finding == "On the frontier: LoRA-A², FlexLoRA and FedAvg"
    assert {row[1]: row[-1] for row in picture.tables[0].rows} == {
        "LoRA-A²": "yes",
        "FedIT": "",
        "FlexLoRA": "yes",
        "FedAvg": "yes",
    }
    points = lines(picture.panels[0])
    assert points["FedAvg"] == ([100], [90])
    assert [row[2] for row in picture.tables[0].rows if row[1] == "FedAvg"] == ["100.000"]


def test_one_contender_has_no_frontier(make: Any) -> None:
    assert frontier.picture(make(run("fedit", [0.5]))) is None


def test_heterogeneity(make: Any) -> None:
    values = {("lora-a2", 0.5): 0.8, ("lora-a2", 0.01): 0.75, ("ffa-lora", 0.5): 0.7, ("ffa-lora", 0.01): 0.3}
    picture = only(ablation.heterogeneity(make(*[run(name, [x], alpha) for (name, alpha), x in values.items()])))
    assert picture.finding == "From Dir(0.5) to Dir(0.01) LoRA-A² loses 5.0 points, FFA-LoRA loses 40.0"
    assert lines(picture.panels[0])["FFA-LoRA"] == ([0, 1], pytest.approx([70, 30]))
    assert [tick.get_text() for tick in drawn(picture.panels[0]).get_xticklabels()] == ["Dir(0.5)", "Dir(0.01)"]
    assert picture.tables[0].rows == (("", "LoRA-A²", "80.0", "75.0"), ("", "FFA-LoRA", "70.0", "30.0"))


def test_places(make: Any) -> None:
    runs = []
    for modules, value in ((["query"], 0.5), ("all-linear", 0.75)):
        one = run("lora-a2", [value])
        runs.append(one | {"tables": one["tables"] | {"model": {"target_modules": modules}}})
    picture = only(ablation.places(make(*runs)))
    assert picture.finding == "Adapters in all-linear reach 75.0 %, in query 50.0 %"
    widths = [bar.get_width() for bar in drawn(picture.panels[0]).patches]
    assert widths == [75, 50]
    assert [row[1:] for row in picture.tables[0].rows] == [("all-linear", "75.0"), ("query", "50.0")]


def test_published_numbers(make: Any) -> None:
    rows = [
        {"method.name": "fedit", "accuracy": 51.5, "spread": 0.5, "upload_params": 4e6},
        {"method.name": "lora-a2", "accuracy": 60},
    ]
    picture = only(published.picture(make(run("fedit", [0.5]), run("lora-a2", [0.7]), run("flexlora", [0.1])), rows))
    assert picture.finding == "1 of 2 cells are within 2 points of the published accuracy; LoRA-A² differs most, by +10.0 points"
    assert picture.tables[0].rows == (
        ("20newsgroups Dir(0.5)", "LoRA-A²", "70.0", "60.00", "+10.0", "250 k", "–"),
        ("20newsgroups Dir(0.5)", "FedIT", "50.0", "51.50 ± 0.50", "−1.5", "250 k", "4 M"),
    )


def test_clients(make: Any) -> None:
    scores = {str(i): 0.05 * i for i in range(20)}
    (one,) = make(run("feddpa", [0.1, None], extra=[{"client_accuracy": scores}, {}], clients=20))
    picture = only(clients.picture([one]))
    assert picture.finding == "The worst tenth of FedDPA's clients has 2.5 %"  # the mean of 0 and 5
    heights = [bar.get_height() for bar in drawn(picture.panels[0]).patches]
    assert heights == pytest.approx([5 * i for i in range(20)])
    assert picture.tables[0].rows[0][2:] == ("2.5", "47.5", "95.0", "20")
    assert [float(row[3]) for row in picture.tables[1].rows] == pytest.approx(heights)
    assert picture.tables[1].rows[3][2] == "client 3"


def test_discordance(make: Any) -> None:
    picture = only(
        discordance.picture(
            make(
                run("fedit", [0.1, 0.2], extra=[{"discordance": 0.25}, {"discordance": 0.5}]),
                run("lora-a2", [0.1, 0.2], extra=[{"discordance": 0.0}, {"discordance": 0.0}]),
                run("fedavg", [0.1, 0.2]),
            )
        )
    )
    assert picture.finding == "Averaging FedIT's factors apart misses the mean update by 50 % in round 2; for LoRA-A² it is exact"
    assert lines(picture.panels[0]) == {"FedIT": ([1, 2], [25, 50]), "LoRA-A²": ([1, 2], [0, 0])}
    assert [row[2:] for row in picture.tables[0].rows] == [("0.00", "0.00"), ("25.00", "50.00")]


def bands(panel: Panel) -> list[list[float]]:
    """Heights of the bars, band by band from below."""
    return [[bar.get_height() for bar in group] for group in drawn(panel).containers]


def test_energy_by_direction(make: Any) -> None:
    """All clients have rank 2 in these runs, so bands double: 1, 2, 3–4, and the rest of five."""
    drained, kept = [0.9, 0.1, 0.0, 0.0, 0.0], [0.4, 0.2, 0.2, 0.1, 0.1]
    picture = only(
        energy.picture(
            make(
                run("flexlora", [0.1, None, 0.2], extra=[{"energy": kept}, {}, {"energy": drained}]),
                run("raflora", [0.1, None, 0.2], extra=[{"energy": kept}, {}, {"energy": kept[:4]}]),
                run("fedavg", [0.1, None, 0.2]),
                run("fedit", [0.1, None, 0.2], extra=[{"energy": [1.0]}] * 3),  # one direction: nothing to see
            )
        )
    )
    assert picture.finding == "In round 3 the first of 5 directions holds 90 % of the energy with FlexLoRA, 40 % with raFLoRA"
    assert [panel.heading for panel in picture.panels] == ["FlexLoRA", "raFLoRA"]
    assert bands(picture.panels[0]) == [pytest.approx(x) for x in ([40, 90], [20, 10], [30, 0], [10, 0])]
    assert bands(picture.panels[1])[2:] == [pytest.approx([30, 30]), pytest.approx([10, 0])]
    assert picture.tables[0].header == ("method", "directions", "round 1", "round 3")
    assert picture.tables[0].rows[:4] == (
        ("FlexLoRA", "1", "40.00", "90.00"),
        ("FlexLoRA", "2", "20.00", "10.00"),
        ("FlexLoRA", "3–4", "30.00", "0.00"),
        ("FlexLoRA", "5", "10.00", "0.00"),
    )
    assert [text.get_text() for text in drawn(picture.panels[0]).texts] == ["1", "2", "3–4", "5", "direction"]


def test_energy_of_one_run_over_seeds_and_where_clients_differ_most(make: Any) -> None:
    found = make(
        run("hetlora", [0.1], extra=[{"energy": [0.5, 0.5]}]),
        run("hetlora", [0.1], seed=1, extra=[{"energy": [0.9, 0.1]}]),
        run("hetlora", [0.1], alpha=5.0, extra=[{"energy": [1.0, 0.0]}]),
    )
    picture = only(energy.picture(found))
    assert picture.finding == "In round 1 the first of 2 directions holds 70 % of the energy"
    assert picture.about.endswith("Shown: Dir(0.5). Means over seeds.")
    assert picture.tables[0].rows == (("HetLoRA", "1", "70.00"), ("HetLoRA", "2", "30.00"))


def test_bands_of_directions() -> None:
    """Up to each rank of the clients; doubling, or by four, where all have one rank or too many differ."""
    assert energy.split([2, 4, 8, 16, 32, 2], 32) == [(0, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    assert energy.split([8, 8, 8], 16) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
    assert energy.split(list(range(1, 31)), 30) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 30)]
    assert energy.split([100], 100) == [(0, 1), (1, 4), (4, 16), (16, 64), (64, 100)]
    assert energy.split([1, 6], 3) == [(0, 1), (1, 3)]
    assert [energy.said(band) for band in ((0, 2), (2, 3), (3, 8))] == ["1–2", "3", "4–8"]


def test_ranks_by_round_and_by_client(make: Any) -> None:
    """2 clients, 2 layers of 3 modules, 4 ranks. In round 1 both choose all ranks of the last module; in round 2 client 3 chooses
    half of them and as many of the first module."""
    first, second = np.zeros((2, 6, 4), dtype=bool), np.zeros((2, 6, 4), dtype=bool)
    first[:, 5] = True
    second[0, 5] = True
    second[1, 5, :2] = second[1, 0, :2] = True
    arrays = {t: {"ranks_chosen": x, "ranks_chosen_clients": np.array([0, 3])} for t, x in ((1, first), (2, second))}
    by_round, by_client = ranks.pictures(make(run("lora-a2", [0.1, 0.2], arrays=arrays)))
    assert (
        by_round.finding == "88 % of the chosen ranks are in output.dense; in the last round 67 % of the modules get none"
    )  # 14 of 16
    assert [panel.heading for panel in by_round.panels] == ["query", "attention.output.dense", "output.dense"]
    shown = drawn(by_round.panels[2]).images[0].get_array()
    assert shown.tolist() == [[0, 0], [4, 3]]  # (layer, round), means over clients
    assert by_round.tables[0].rows[5] == ("bert.encoder.layer.1.output.dense", "4.00", "3.00")
    assert by_client.finding == "In round 2 two clients share 50 % of their ranks on average"
    assert [panel.heading for panel in by_client.panels] == ["client 0", "client 3"]
    assert drawn(by_client.panels[1]).images[0].get_array().tolist() == [[2, 0, 0], [0, 0, 2]]
    assert by_client.tables[0].rows[0] == ("bert.encoder.layer.0.attention.self.query", "0", "2")


def test_modules_without_names_and_counts_of_an_older_kind(make: Any) -> None:
    assert ranks.pictures(make(run("lora-a2", [0.1], arrays={1: {"ranks_chosen": np.ones((2, 6))}}))) == []
    assert ranks.Grid.of(("lm.head", "h.0.attn", "h.1.attn")).kinds == ("head", "attn")


def test_ranks_in_common() -> None:
    chosen = np.array([[[1, 1, 0, 0]], [[1, 0, 1, 1]], [[0, 0, 0, 0]]], dtype=bool)
    shared = ranks.common(chosen)
    assert shared[:2, :2].tolist() == [[1, 0.5], [0.5, 1]]
    assert np.isnan(shared[2]).all()


def test_similarity(make: Any) -> None:
    cosines = np.array([[1, 0.5, -0.25], [0.5, 1, 0], [-0.25, 0, 1]], dtype=np.float32)
    arrays = {2: {"similarity": cosines, "similarity_clients": np.array([0, 2, 3])}}
    (picture,) = similarity.pictures(make(run("fedit", [0.1, 0.2], arrays=arrays)))
    assert picture.finding == "Mean cosine of two clients' updates: 0.08"  # (0.5 - 0.25 + 0) / 3
    assert np.array_equal(drawn(picture.panels[0]).images[0].get_array(), cosines)
    assert picture.tables[0].header == ("client", "client 0", "client 2", "client 3")
    assert picture.tables[0].rows[2] == ("client 3", "-0.25", "0.00", "1.00")


def test_time(make: Any) -> None:
    picture = only(clock.picture(make(run("fedit", [0.1]))))  # train 8, evaluate 1.5, aggregate 0.25 of 10 seconds
    assert picture.finding == "80 % of the time goes to train"
    assert [bar.get_width() for bar in drawn(picture.panels[0]).patches] == [8, 1.5, 0.25, 0.25]
    assert picture.tables[0].header[2:] == ("train", "evaluate", "aggregate", "other", "in all")
    assert picture.tables[0].rows[0][2:] == ("8", "1.5", "0.25", "0.25", "10")


def test_limits() -> None:
    assert percent_limits([]) == (0, 100)
    assert percent_limits([3.0, 22.0]) == (0, 30)
    assert percent_limits([71.0, 99.5]) == (70, 100)
