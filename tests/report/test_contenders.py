"""Runs become contenders in places, as a reader would sort them; the answer is computed by hand."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.report.answers import answers, bytes_to, params, size
from fedlora.report.contenders import Contender, by_panel, by_place, contenders, hardest, spread, title, word
from fedlora.report.runs import comparison, read
from fedlora.report.summary import settings_tables

Write = Callable[..., Path]


@pytest.fixture
def make(write: Write, tmp_path: Path) -> Callable[..., tuple[Contender, ...]]:
    """Cells of runs: (tables, accuracy by round, bytes a round)."""

    def make(*runs: tuple[Mapping[str, Any], Sequence[float | None], int]) -> tuple[Contender, ...]:
        return contenders(comparison([read(write(tmp_path / str(i), *run)) for i, run in enumerate(runs)]))

    return make


def at(method: str, alpha: float = 0.5, rank: int = 8, seed: int = 0, **train: Any) -> dict[str, Any]:
    tables: dict[str, Any] = {"method": {"name": method}, "data": {"alpha": alpha}, "clients": {"rank": rank}, "seed": seed}
    return tables | {"train": train}


def test_seeds_make_one_cell(make: Any) -> None:
    (one,) = make((at("fedit", seed=0), [0.1, 0.2], 50), (at("fedit", seed=1), [0.3, 0.6], 70))
    final = one.final()
    assert final is not None
    assert (final.mean, final.low, final.high, final.count) == pytest.approx((40, 20, 60, 2))
    assert final.std == pytest.approx(800**0.5)  # sample: sqrt((20^2 + 20^2) / 1)
    assert str(final) == "40.0 ± 28.3"
    curve = one.curve()
    assert curve.mean == pytest.approx([20, 40])
    assert curve.megabytes == pytest.approx([60e-6, 120e-6])
    assert one.total("upload_bytes") == 120


def test_a_mean_is_over_the_rounds_that_every_seed_has(make: Any) -> None:
    long = at("fedit", seed=1, rounds=3)
    (one,) = make((at("fedit", seed=0, rounds=3), [0.1, 0.2, 0.3], 1), (long, [None, 0.4], 1))
    assert one.curve().rounds.tolist() == [2]
    assert one.curve().mean == pytest.approx([30])
    assert one.unfinished
    assert one.last_round == 3


def test_reading_order_and_names(make: Any) -> None:
    found = make(*[(at(m, a, r), [0.5], 1) for a in (0.01, 0.5) for r in (1, 8) for m in ("ce-lora", "ffa-lora", "lora-a2")])
    assert [(contender.where, contender.name) for contender in found[:7]] == [
        ("Dir(0.5)", "LoRA-A² rank 8"),
        ("Dir(0.5)", "LoRA-A² rank 1"),
        ("Dir(0.5)", "FFA-LoRA rank 8"),
        ("Dir(0.5)", "FFA-LoRA rank 1"),
        ("Dir(0.5)", "CE-LoRA rank 8"),
        ("Dir(0.5)", "CE-LoRA rank 1"),
        ("Dir(0.01)", "LoRA-A² rank 8"),
    ]
    assert list(by_place(found)) == ["Dir(0.5)", "Dir(0.01)"]
    assert list(by_panel(found)) == ["Dir(0.5), rank 8", "Dir(0.5), rank 1", "Dir(0.01), rank 8", "Dir(0.01), rank 1"]
    assert hardest(found) == "Dir(0.01)"


def test_settings_that_follow_from_the_method_do_not_name_a_line(make: Any) -> None:
    found = make((at("fedavg", lr=1e-4), [0.5], 1), (at("lora-a2", lr=5e-4), [0.5], 1))
    assert [contender.name for contender in found] == ["LoRA-A²", "FedAvg"]
    assert _rows(found, "Set for each method") == (("LoRA-A²", "lr = 0.0005"), ("FedAvg (full fine-tuning)", "lr = 0.0001"))


def _rows(found: Sequence[Contender], caption: str) -> tuple[tuple[str, ...], ...]:
    tables = settings_tables(comparison([run for contender in found for run in contender.runs]), found)
    return next(table.rows for table in tables if table.caption == caption)


def test_a_setting_that_one_method_varies_does(make: Any) -> None:
    first, second = make((at("lora-a2", lr=1e-4), [0.5], 1), (at("lora-a2", lr=5e-4), [0.5], 1))
    assert [first.name, second.name] == ["LoRA-A² lr = 0.0001", "LoRA-A² lr = 0.0005"]
    assert first.look != second.look


def test_each_method_shows_what_itself_varies(make: Any) -> None:
    """Figure 6 of the LoRA-A² paper: one method varies a field of its own, the other the learning rate."""
    a2 = [at("lora-a2", lr=5e-4) | {"method": {"name": "lora-a2", "lr_ratio_b": ratio}} for ratio in (1.0, 5.0)]
    ffa = [at("ffa-lora", lr=lr) for lr in (5e-4, 2.5e-3)]
    found = make(*[(tables, [0.5], 1) for tables in (*a2, *ffa)])
    assert [contender.name for contender in found] == [
        "LoRA-A² lr_ratio_b = 1",
        "LoRA-A² lr_ratio_b = 5",
        "FFA-LoRA lr = 0.0005",
        "FFA-LoRA lr = 0.0025",
    ]


def test_modules_are_in_natural_order(make: Any) -> None:
    patterns = [r".*layer\.10\..*", r".*layer\.9\..*", "all-linear", r".*\.\d+\.output\.dense"]
    found = make(*[(at("fedit") | {"model": {"target_modules": each}}, [0.5], 1) for each in patterns])
    assert [contender.name for contender in found] == [
        "FedIT in output.dense",
        "FedIT in layer.9",
        "FedIT in layer.10",
        "FedIT in all-linear",
    ]


def test_the_place_of_a_single_run(make: Any) -> None:
    (one,) = make((at("fedit"), [0.5], 1))
    assert (one.where, one.name) == ("20newsgroups Dir(0.5)", "FedIT")


def test_words() -> None:
    assert word("data.alpha", 0.01) == "Dir(0.01)"
    assert word("model.target_modules", ["query", "value"]) == "in query, value"
    assert word("method.criterion", "magnitude") == "magnitude"
    assert word("method.probe_reset", False) == "no probe_reset"
    assert word("train.lr", 0.001) == "lr = 0.001"


def test_titles() -> None:
    assert title("fedit") == "FedIT"
    assert title("fedit", full=True) == "FedIT (FL+LoRA)"
    assert title("somewhere.else:Mine") == "Mine"  # its code need not be at hand


def test_no_values_have_no_spread() -> None:
    assert spread([]) is None
    one = spread([3.0])
    assert one is not None
    assert str(one) == "3.0"


def test_the_answer(make: Any) -> None:
    """fedit ends at 80 %; 95 % of it is 76 %, which ffa-lora reaches in round 2 after 10 MB, fedit in round 3 after 30 MB."""
    fedit = (at("fedit"), [0.2, 0.5, 0.78, 0.8], 10_000_000)
    ffa = (at("ffa-lora"), [0.5, 0.76, 0.70, 0.77], 5_000_000)
    slow = (at("lora-a2"), [0.1, 0.2, 0.3, 0.4], 1)
    (found,) = answers(make(fedit, ffa, slow))
    assert [contender.name for contender in found.contenders] == ["FedIT", "FFA-LoRA", "LoRA-A²"]
    assert found.target == 76
    assert [(contender.name, cost) for contender, cost in found.reached] == [("FFA-LoRA", 10e6), ("FedIT", 30e6)]
    assert bytes_to(found.contenders[2], 76) is None
    assert found.noise == pytest.approx(100 * 1.96 * (0.8 * 0.2 / 100) ** 0.5)  # 4 clients of 25 test examples


def test_no_scores_no_answer(make: Any) -> None:
    assert answers(make((at("fedit"), [None, None], 1))) == []


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (2660, "2.66 kB"), (52.8e9, "52.8 GB"), (3.2e13, "32 TB")])
def test_sizes(count: float, said: str) -> None:
    assert size(count) == said


def test_params() -> None:
    assert [params(x) for x in (12, 995_328, 1.99e6)] == ["12", "995 k", "1.99 M"]
