"""Regression of texts: its sums against numpy and scipy, its reader line by line, its runs against plain transformers and PEFT."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import scipy.stats
import tiny
import torch
import transformers

from fedlora.config import DataConfig, resolve
from fedlora.data.dataset import Domain, Schema
from fedlora.data.encoded import Encoded
from fedlora.data.load import load as load_data
from fedlora.errors import BadInput
from fedlora.runs.play import execute
from fedlora.runs.predict import predict
from fedlora.runs.roster import read_roster
from fedlora.tasks.metrics import fit, total
from fedlora.tasks.text_regression import TextRegression

TASK = TextRegression()
ONE = Schema(scales=((3.0, 2.0),))
NOBODY: Any = None  # who need not be asked for a constant answer


def encoded(targets: np.ndarray, domains: list[int] | None = None) -> Encoded:
    n = len(targets)
    own = np.array(domains or [], dtype=np.int64)
    return Encoded((np.zeros(1, dtype=np.int32),) * n, targets, np.ones(n, dtype=np.int64), own)


def test_scores_are_those_of_numpy_and_scipy_whatever_the_clients() -> None:
    rng = np.random.default_rng(0)
    y, o = rng.normal(3, 2, 300), rng.normal(0, 1, (300, 1)).astype(np.float32)
    p = 3 + 2 * o[:, 0].astype(np.float64)
    y = y + p
    bound = TASK.bind(ONE)
    cuts = np.split(np.arange(300), [7, 7, 150])
    sums = total(bound, [bound.sums(o[w], encoded(y[w])) | bound.of_constant(np.array([2.5]), encoded(y[w]), NOBODY) for w in cuts])
    scores = bound.scores(sums)
    assert scores["mse"] == pytest.approx(np.mean((p - y) ** 2), rel=1e-12)
    assert scores["mae"] == pytest.approx(np.mean(abs(p - y)), rel=1e-12)
    assert scores["pearson"] == pytest.approx(scipy.stats.pearsonr(p, y).statistic, rel=1e-12)
    assert bound.baseline(sums) == pytest.approx(np.mean((2.5 - y) ** 2), rel=1e-12)
    assert (bound.count(sums), bound.undecided(sums)) == (300, 0) and list(scores) == [m.name for m in bound.metrics]
    assert (
        fit(bound, sums)
        and not fit(bound, sums | {"count": -sums["count"]})
        and not fit(bound, sums | {"errors": np.array([np.nan])})
    )
    loss = bound.losses(torch.from_numpy(o), encoded(y))
    np.testing.assert_allclose(loss.numpy(), (o[:, 0] - (y - 3) / 2) ** 2, rtol=1e-5, atol=1e-6)


def test_an_answer_that_is_no_number_counts_as_the_mean_of_the_training_part() -> None:
    bound, o = TASK.bind(ONE), np.array([[np.nan], [np.inf], [1.0]], dtype=np.float32)
    sums = bound.sums(o, encoded(np.array([1.0, 4.0, 6.0])))
    assert bound.undecided(sums) == 2 and bound.count(sums) == 3
    assert bound.scores(sums | {"constant": np.zeros(1)})["mse"] == pytest.approx(((3 - 1) ** 2 + (3 - 4) ** 2 + (5 - 6) ** 2) / 3)
    with pytest.raises(BadInput, match="not finite"):
        TASK.answers(["a", "b", "c"], Said(o, ONE))


def test_there_is_no_correlation_without_spread_and_no_score_without_examples() -> None:
    bound = TASK.bind(ONE)
    flat = bound.sums(np.full((4, 1), 0.3, dtype=np.float32), encoded(np.array([1.0, 2.0, 3.0, 4.0])))
    assert np.isnan(bound.scores(flat)["pearson"]) and bound.scores(flat)["mse"] > 0
    assert all(np.isnan(x) for x in bound.scores(bound.zeros()).values()) and np.isnan(bound.baseline(bound.zeros()))


def test_each_domain_has_its_own_scale_its_own_constant_and_its_own_error() -> None:
    schema = Schema(domains=(Domain("stars", 0, 0), Domain("prices", 0, 0)), scales=((3.0, 1.0), (1000.0, 500.0)))
    bound = TASK.bind(schema)
    data = encoded(np.array([2.0, 5.0, 900.0]), [0, 0, 1])
    sums = bound.sums(np.array([[0.0], [1.0], [0.5]], dtype=np.float32), data)
    assert bound.by_domain(sums) == pytest.approx({"stars": (1.0 + 1.0) / 2, "prices": 350.0**2})
    assert bound.constant(data).tolist() == [3.5, 900.0]
    assert bound.constant(data.take(np.array([0])), np.array([9.0, 8.0])).tolist() == [2.0, 8.0]
    assert bound.of_constant(np.array([3.0, 800.0]), data, NOBODY)["constant"].tolist() == [1.0 + 4.0, 100.0**2]
    assert [x["number"] for x in TASK.answers(["a"], Said(np.array([[1.0]]), schema, 1))] == [1500.0]


class Said:
    """A model that gives these outputs (`fedlora.tasks.base.Answering`)."""

    pretrained: Any = None
    limit = 64

    def __init__(self, outputs: np.ndarray, schema: Schema, domain: int | None = None) -> None:
        self.given, self.schema, self.domain = outputs, schema, domain

    def outputs(self, inputs: Sequence[Any]) -> np.ndarray:
        return self.given

    def generate(self, prompts: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
        raise NotImplementedError


def write(file: Path, rows: list[tuple[str, object]], names: tuple[str, str] = ("text", "label")) -> Path:
    with open(file, "w", newline="") as opened:
        csv.writer(opened).writerows([names, *rows])
    return file


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("good", "line 4: 'good' is no finite number"),
        ("nan", "line 4: 'nan' is no finite number"),
        ("inf", "line 4: 'inf' is no finite number"),
        ("1e999", "line 4: '1e999' is no finite number"),
        ("1e200", "line 4: '1e200' is beyond 1e+140, and its square is no number; take another unit"),
        ("1_000", "line 4: '1_000' is no finite number"),
        ("3,5", "line 4: '3,5' is no finite number"),
        ("", "has no value in line 4"),
    ],
)
def test_what_is_no_number_is_named_with_its_row(value: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "stars.csv", [("a", "1"), ("b", " 2.50 "), ("c", value), ("d", "-1e-1")])
    with pytest.raises(BadInput, match="column 'label'") as error:
        load_data(TASK, DataConfig(source=str(file)), 0)
    assert str(file) in str(error.value) and said in str(error.value)


def test_a_column_of_one_number_or_of_truth_values_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    same = write(tmp_path / "same.csv", [("a", 2), ("b", 2.0)])
    with pytest.raises(BadInput, match=r"same\.csv: column 'label' holds only one number, 2; two are needed"):
        load_data(TASK, DataConfig(source=str(same)), 0)
    parquet.write_table(pa.table({"text": ["a", "b"], "label": [True, False]}), tmp_path / "bool.parquet")
    with pytest.raises(BadInput, match=r"column 'label' holds bool, not numbers"):
        load_data(TASK, DataConfig(source=str(tmp_path / "bool.parquet")), 0)


def test_a_data_set_has_the_training_parts_scale_and_strata_by_tenths(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    price = np.round(rng.lognormal(3, 1, 200), 2)
    write(tmp_path / "train.csv", [(f"t{i}", x) for i, x in enumerate(price)])
    write(tmp_path / "test.csv", [("below", -1.0), ("above", 1e6), ("median", float(np.median(price)))])
    data = load_data(TASK, DataConfig(source=str(tmp_path)), 0)
    ((mean, spread),) = data.schema.scales
    assert (mean, spread) == pytest.approx((price.mean(), np.sqrt(((price - price.mean()) ** 2).mean())))
    assert np.bincount(data.train.strata).tolist() == [20] * 10 and data.strata_kind == "ranges" and len(data.strata_names) == 10
    assert all(price[data.train.strata == k].max() <= price[data.train.strata == k + 1].min() for k in range(9))
    assert data.test.strata.tolist()[:2] == [0, 9] and data.test.strata[2] in (4, 5)
    assert data.test.targets.tolist()[:2] == [-1.0, 1e6]


def test_ratings_are_a_stratum_each_and_held_out_parts_keep_whole_numbers_of_them(tmp_path: Path) -> None:
    file = write(tmp_path / "stars.csv", [(f"t{i}", 1 + i % 5) for i in range(50)])
    data = load_data(TASK, DataConfig(source=str(file), validation=0.1), 0)
    assert data.strata_names == ("1", "2", "3", "4", "5")
    for _, part in data.parts:
        assert part.strata.dtype == np.int64 and (part.strata == part.targets - 1).all()
    assert data.train.take(np.zeros(0, dtype=np.int64)).strata.dtype == np.int64
    both = load_data(TASK, DataConfig(source=[str(file), str(write(tmp_path / "prices.csv", [("a", 0), ("b", 100)] * 4))]), 0)
    assert np.ravel(both.schema.scales) == pytest.approx([3.0, 2.0**0.5, 50.0, 50.0]) and both.train.strata.dtype == np.int64
    assert both.strata_names[-1] == "prices/100" and set(both.train.targets[both.train.domains == 1]) == {0.0, 100.0}


# ---- whole runs --------------------------------------------------------------------------------------------------------


def rating(text: str) -> float:
    return {"apple": 250.0, "banana": 100.0}.get(next((w for w in text.split() if w in tiny.CLASSES), ""), 400.0)


def ratings(folder: Path) -> Path:
    folder.mkdir()
    for part, count, seed in (("train", 60, 1), ("test", 30, 2)):
        write(folder / f"{part}.csv", [(text, rating(text)) for text in tiny.examples(count, seed)[0]])
    return folder


def run(folder: Path, kind: str = "bert", **tables: Any) -> dict[str, Any]:
    tiny.save_model(kind, folder / "base")
    ratings(folder / "prices")
    common = {
        "precision": "fp32",
        "task": {"name": "text_regression"},
        "method": {"name": "fedit"},
        "model": {"source": str(folder / "base"), "head": "shared"},
        "data": {"source": str(folder / "prices"), "alpha": 9.0},
        "clients": {"count": 3, "rank": 2},
        "train": {"rounds": 2, "lr": 0.02, "batch_size": 8, "epochs": 2},
    }
    return execute(resolve(common, tables), folder / "run", False, tiny.Silent())


@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_adapter_model_and_predict_give_the_numbers_that_were_scored(kind: str, tmp_path: Path) -> None:
    """A decoder's head has no bias, so the shift can only stand beside it."""
    summary = run(tmp_path, kind)
    with open(tmp_path / "prices" / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    y, words = np.array([float(row["label"]) for row in rows]), transformers.AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    base.config.pad_token_id = words.pad_token_id
    adapter = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    known = json.loads((tmp_path / "run" / "adapter" / "fedlora.json").read_text())
    ((mean, spread),) = known["scales"]
    with torch.no_grad():
        p = [mean + spread * float(adapter(**words(row["text"], return_tensors="pt")).logits) for row in rows]
    assert summary["final"]["mse"] == pytest.approx(np.mean((np.array(p) - y) ** 2), rel=1e-4)
    assert (
        summary["final"]["score"] == summary["final"]["mse"]
        and summary["final"]["metric"] == "mse"
        and known["mse"] == summary["final"]["mse"]
    )
    assert summary["final"]["pearson"] == pytest.approx(np.corrcoef(p, y)[0, 1], rel=1e-4)
    train = [rating(text) for text in tiny.examples(60, 1)[0]]
    assert summary["final"]["constant_mse"] == pytest.approx(np.mean((np.mean(train) - y) ** 2))
    answers = predict(tmp_path / "run", [row["text"] for row in rows])
    np.testing.assert_allclose([x["number"] for x in answers], p, rtol=1e-4)
    assert read_roster(tmp_path / "run" / "federation.json").schema.scales == ((mean, spread),)


def test_the_code_of_the_card_prints_numbers_in_the_datas_own_unit(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    run(tmp_path)
    monkeypatch.chdir(tmp_path / "run" / "adapter")
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('"a text", "another"', '"w1 apple", "w2"'), {})
    said = [x["number"] for x in predict(tmp_path / "run", ["w1 apple", "w2"])]
    np.testing.assert_allclose(json.loads(capsys.readouterr().out.splitlines()[-1]), said, rtol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped_and_learns(tmp_path: Path) -> None:
    run(tmp_path, train={"rounds": 1})
    config = resolve(
        {"train": {"rounds": 3}},
        {"precision": "fp32", "task": {"name": "text_regression"}, "method": {"name": "fedit"}, "clients": {"count": 3, "rank": 2}},
        {"model": {"source": str(tmp_path / "base"), "head": "shared"}, "data": {"source": str(tmp_path / "prices"), "alpha": 9.0}},
        {"train": {"lr": 0.02, "batch_size": 8, "epochs": 2}},
    )
    summary = execute(config, tmp_path / "run", True, tiny.Silent())
    assert summary["rounds"] == 3
    whole = execute(config, tmp_path / "whole", False, tiny.Silent())
    assert summary["final"]["mse"] == whole["final"]["mse"] < whole["final"]["constant_mse"]


def test_a_method_that_needs_classes_is_refused_before_round_1(tmp_path: Path) -> None:
    config = resolve({"task": {"name": "text_regression"}, "method": {"name": "ce-lora"}})
    with pytest.raises(
        BadInput, match=r"^CE-LoRA needs classes, and text regression has none; take another method or another task$"
    ):
        execute(config, tmp_path / "run", False, tiny.Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_line_from_the_table_to_the_answer(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tiny.save_model("bert", tmp_path / "base")
    ratings(tmp_path / "prices")
    call = tiny.console(monkeypatch, capsys, tmp_path)
    status, out, _ = call("data", "prices", "--task", "text_regression", "--clients", 3)
    assert status == 0 and "examples of 3 ranges" in out and (tmp_path / "split.png").exists()
    status, out, err = call(
        *("run", "--task", "text_regression", "--method", "fedit", "--data", "prices", "--model", "base", "--clients", 3),
        *("--rounds", 1, "--rank", 2, "--out", "run"),
    )
    assert status == 0 and "MSE" in out and "training mean" in out, err
    status, out, _ = call("predict", "run", "w1 apple")
    assert status == 0 and float(out.split("\t")[0]) and out.split("\t")[1] == "w1 apple\n"
    status, out, _ = call("predict", "run", "w1 apple", "--format", "csv")
    assert status == 0 and out.splitlines()[0] == "text,number"


def test_two_data_sets_are_scored_apart(tmp_path: Path) -> None:
    tiny.save_model("bert", tmp_path / "base")
    write(tmp_path / "stars.csv", [(text, len(text) % 3) for text in tiny.examples(30, 1)[0]])
    write(tmp_path / "prices.csv", [(text, rating(text)) for text in tiny.examples(40, 2)[0]])
    sources = [str(tmp_path / "stars.csv"), str(tmp_path / "prices.csv")]
    tables = {
        "task": {"name": "text_regression"},
        "method": {"name": "fedit"},
        "model": {"source": str(tmp_path / "base")},
        "data": {"source": sources},
        "clients": {"count": 4, "rank": 2, "domains": 1},
        "train": {"rounds": 1, "batch_size": 8},
    }
    execute(resolve(tables), tmp_path / "run", False, tiny.Silent())
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(row["domain_mse"]) == {"stars", "prices"} and row["domain_mse"]["stars"] < 10 < row["domain_mse"]["prices"]
    (stars,), (price,) = (predict(tmp_path / "run", ["w1"], domain=name) for name in ("stars", "prices"))
    scales = dict(zip(("stars", "prices"), read_roster(tmp_path / "run" / "federation.json").schema.scales, strict=True))
    o = [(x["number"] - scales[name][0]) / scales[name][1] for name, x in (("stars", stars), ("prices", price))]
    assert o[0] == pytest.approx(o[1], rel=1e-5)


def test_the_digest_knows_fractions(tmp_path: Path) -> None:
    file = write(tmp_path / "stars.csv", [(f"t{i}", i / 7) for i in range(30)])
    data = load_data(TASK, DataConfig(source=str(file)), 0)
    other = replace(data, train=replace(data.train, targets=data.train.targets + 1e-12))
    assert data.digest != other.digest
