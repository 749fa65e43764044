"""What the page says first: ties, the commonest class, validation, personal models, what failed. Numbers by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.report.answers import answers
from fedlora.report.contenders import Contender, contenders, joined
from fedlora.report.plots import frontier
from fedlora.report.runs import Run, comparison, read
from fedlora.report.summary import answer_table, held, lead, losses, lost_table, notes, results, spans

Write = Callable[..., Path]
ALL = "The training loss still fell at the end, so more rounds may help: all of them."


@pytest.fixture
def make(write: Write, tmp_path: Path) -> Callable[..., Run]:
    """A run: a method, its accuracies by round, bytes a round, keys of every row."""

    def make(method: str, accuracy: Sequence[float], upload: int = 10**6, row: Any = None, alpha: float = 0.5, **more: Any) -> Run:
        tables = {"method": {"name": method}, "data": {"alpha": alpha}} | more.pop("tables", {})
        extra = [row or {}] * len(accuracy)
        return read(write(tmp_path / f"{method}-{alpha}-{len(list(tmp_path.iterdir()))}", tables, accuracy, upload, extra, **more))

    return make


def found(*runs: Run) -> tuple[Contender, ...]:
    return contenders(comparison(runs))


def test_equal_to_a_tenth_of_a_point_is_a_tie(make: Any) -> None:
    """33.84 and 33.76 are both shown as 33.8; the cheaper of them is not the more accurate."""
    here = found(make("fedit", [0.3384]), make("flexlora", [0.3376], 2 * 10**6), make("lora-a2", [0.3]))
    (answer,) = answers(here)
    assert [contender.name for contender in answer.leaders] == ["FedIT", "FlexLoRA"]
    assert lead(here) == (
        "Most accurate: FedIT and FlexLoRA with 33.8 %, then LoRA-A² with 30.0 %. "
        "Fewest bytes to reach 32 %: FedIT with 1 MB uploaded; FlexLoRA needs 2 MB."
    )
    table = answer_table(here)
    assert table is not None
    assert table.rows == (("FedIT and FlexLoRA", "33.8 %", "32 %", "FedIT", "1 MB"),)


def test_all_equal(make: Any) -> None:
    here = found(make("fedit", [0.5]), make("flexlora", [0.5]))
    assert (
        lead(here)
        == "Equally accurate: FedIT and FlexLoRA with 50.0 %. Fewest bytes to reach 47 %: FedIT and FlexLoRA with 1 MB uploaded."
    )
    picture = frontier.picture(here)
    assert picture is not None
    assert picture.finding == "On the frontier: FedIT and FlexLoRA"


@pytest.mark.parametrize(("commonest", "no_better"), [(0.34, True), (0.3384, True), (0.337, False)])
def test_nothing_beats_the_commonest_class(make: Any, commonest: float, no_better: bool) -> None:
    row = {"commonest_accuracy": commonest}
    here = found(make("fedit", [0.338], row=row), make("lora-a2", [0.3], row=row))
    assert lead(here).startswith("No method does better than the commonest class: always answering it is right in") is no_better
    (table,) = results(here)
    assert table.rows[-1][:3] == ("always the commonest class", f"{100 * commonest:.1f}", "–")
    assert lead(found(make("fedit", [0.338], row=row))).endswith("is right in 34.0 %." if commonest == 0.34 else ".")


def test_what_diverged_is_not_ranked(make: Any) -> None:
    """The loss of a round in which nothing could be used is null."""
    here = found(make("fedit", [0.9, 0.9], row={"loss": None}), make("lora-a2", [0.1, 0.2]))
    assert lead(here) == "LoRA-A² reaches 20.0 % after 2 rounds and 2 MB of uploads."
    assert [row[:2] for row in results(here)[0].rows] == [("LoRA-A²", "20.0"), ("FedIT", "90.0 (diverged)")]
    assert any(
        note.startswith("Diverged, so not ranked: FedIT.")
        for note in notes(comparison([run for contender in here for run in contender.runs]), here)
    )
    assert frontier.picture(here) is None
    assert lead(here[1:]) == "Every run has diverged, so there is no answer."


def test_personal_models_are_a_group_of_their_own(make: Any) -> None:
    own = {"client_accuracy": {"0": 0.9, "1": 0.8}, "commonest_accuracy": 0.7}
    runs = [make("fedit", [0.4]), make("lora-a2", [0.5]), make("feddpa", [0.9], row=own), make("ce-lora", [0.8], row=own)]
    here = found(*runs)
    assert [(contender.where, contender.name) for contender in here] == [
        ("common model", "LoRA-A²"),
        ("common model", "FedIT"),
        ("personal models", "CE-LoRA"),
        ("personal models", "FedDPA"),
    ]
    assert lead(here) == (
        "One common model. Most accurate: LoRA-A² with 50.0 %, then FedIT with 40.0 %. "
        "Fewest bytes to reach 47 %: LoRA-A² with 1 MB uploaded; no other method gets there.\n"
        "Personal models, each scored on its client's own test examples. "
        "Most accurate: FedDPA with 90.0 %, then CE-LoRA with 80.0 %. "
        "Fewest bytes to reach 85 %: FedDPA with 1 MB uploaded; no other method gets there."
    )
    common, personal = results(here)
    assert [row[0] for row in common.rows] == ["LoRA-A²", "FedIT"]
    assert [row[0] for row in personal.rows] == ["FedDPA", "CE-LoRA", "always the commonest class"]
    assert "personal" in personal.caption and "common" in common.caption
    alone = found(runs[2], runs[3])
    assert {contender.kind for contender in alone} == {""}
    assert "Each client's personal model is scored on the client's own test examples." in notes(comparison(runs[2:]), alone)


def test_the_round_that_validation_chose_is_what_is_reported(make: Any, write: Write, tmp_path: Path) -> None:
    """The best on the test set is round 1; validation chose round 2; training stopped after round 3 of 9."""
    rows = [{"validation_accuracy": x, "macro_f1": x / 2} for x in (0.4, 0.6, 0.5)]
    tables = {"method": {"name": "fedit"}, "train": {"rounds": 9}}
    run = read(write(tmp_path / "run", tables, [0.9, 0.5, 0.7], extra=rows, written=2))
    here = found(run)
    assert lead(here) == (
        "FedIT reaches 50.0 % in round 2, the best by validation (60.0 % there); 3 rounds and 3 MB of uploads in all."
    )
    assert not here[0].unfinished
    (table,) = results(here)
    assert table.header[1:4] == ("20newsgroups Dir(0.5), %", "macro F1, %", "validation accuracy, %")
    assert table.rows[0][1:4] == ("50.0", "30.0", "60.0")
    assert notes(comparison([run]), here) == ["Validation chose the round that is scored and written, never the test set."]


def test_other_scores_of_several_places_have_tables_of_their_own(make: Any) -> None:
    here = found(make("fedit", [0.5], row={"macro_f1": 0.25}), make("fedit", [0.4], row={"macro_f1": 0.125}, alpha=0.1))
    accuracy, f1 = results(here)
    assert accuracy.rows[0][:3] == ("FedIT", "50.0", "40.0")
    assert (f1.caption, f1.rows) == ("Final macro F1", (("FedIT", "25.0", "12.5"),))


def test_a_loss_that_still_falls(make: Any) -> None:
    """The fixture's loss is 1 / round."""
    runs = [make("fedit", [0.1] * 4), make("lora-a2", [0.1] * 4)]
    assert ALL in notes(comparison(runs), found(*runs))
    still = make("flexlora", [0.1] * 4, row={"loss": 1.0})
    both = [runs[0], still]
    assert "The training loss still fell at the end, so more rounds may help: FedIT." in notes(comparison(both), found(*both))


def test_clients_that_failed(make: Any, write: Write, tmp_path: Path) -> None:
    rows = [
        {"failures": {"1": "no number"}},
        {"failures": {"1": "timed out", "3": "timed out"}},
        {},
        {"failures": {"1": "no number"}},
    ]
    run = read(write(tmp_path / "run", {}, [0.1] * 4, extra=[row | {"loss": 1.0} for row in rows]))
    (contender,) = here = found(run)
    assert losses(contender) == [("client 1", [1, 2, 4], "no number"), ("client 3", [2], "timed out")]
    table = lost_table(here)
    assert table is not None
    assert table.rows == (("LoRA-A²", "client 1", "3", "1–2, 4", "no number"), ("LoRA-A²", "client 3", "1", "2", "timed out"))
    assert notes(comparison([run]), here) == ["Clients failed in LoRA-A²: see Clients that failed."]
    assert lost_table(found(make("fedit", [0.1]))) is None


def test_paths_are_no_names(make: Any) -> None:
    """Two files of one name are two places, told apart by as much of their paths as it takes."""
    runs = [
        make("fedit", [0.5], tables={"data": {"source": f"/home/me/{x}/train.csv"}, "model": {"source": "/m/bert"}}) for x in "ab"
    ]
    assert [contender.where for contender in found(*runs)] == ["a/train.csv", "b/train.csv"]
    assert dict(held(comparison(runs)))["model"] == "bert"
    assert found(runs[0])[0].where == "train.csv Dir(0.5)"


def test_words() -> None:
    assert [joined(names) for names in (["A"], ["A", "B"], ["A", "B", "C"])] == ["A", "A and B", "A, B and C"]
    assert [spans(rounds) for rounds in ([2], [1, 2, 3], [1, 3, 4, 9])] == ["2", "1–3", "1, 3–4, 9"]
