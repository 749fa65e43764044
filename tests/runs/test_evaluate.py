"""What a round's scores are of: counted again by hand from the answers that models give."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import Silent

from fedlora.config import resolve
from fedlora.data.domains import deal
from fedlora.data.load import load
from fedlora.errors import RunFailed
from fedlora.runs import play
from fedlora.summary import read_rows
from fedlora.training.metrics import UNDECIDED, accuracy, confusion, decided, macro_f1


def test_a_confusion_matrix_counts_true_classes_in_rows() -> None:
    found = confusion(np.array([0, 2, 2, 1]), np.array([0, 1, 1, 2]), 4)
    assert found.tolist() == [[1, 0, 0, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert confusion(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 2).tolist() == [[0, 0], [0, 0]]


def test_what_is_not_finite_is_no_answer() -> None:
    logits = np.array([[0.0, 1.0], [np.nan, 1.0], [2.0, np.inf], [3.0, 1.0]])
    found = decided(logits)
    assert found.tolist() == [1, UNDECIDED, UNDECIDED, 0]
    labels = np.array([1, 1, 1, 0])
    assert accuracy(found, labels) == 0.5
    assert macro_f1(found, labels) == pytest.approx((1 + 2 / 4) / 2)  # class 1: one hit of three, one prediction
    assert confusion(found, labels, 2).tolist() == [[1, 0], [0, 1]]
    assert macro_f1(np.array([UNDECIDED]), np.array([0])) == 0.0


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e4), ("adamw", 1e38)])
def test_a_run_that_diverges_fails_and_says_what_may_help(
    optimizer: str, lr: float, bert_folder: Path, csv_folder: Path, tmp_path: Path
) -> None:
    """Also no warning of a library is heard: in tests they are errors."""
    train = {"rounds": 3, "batch_size": 8, "lr": lr, "optimizer": optimizer}
    data = {"source": str(csv_folder), "alpha": 1.0}
    tables = {"method": {"name": "fedit"}, "model": {"source": str(bert_folder)}, "data": data, "clients": {"count": 4, "rank": 2}}
    with pytest.raises(RunFailed, match=r"^round \d: none of 4 replies counts: client 0: .*finite; a lower train\.lr may help$"):
        play.execute(resolve(tables, {"train": train}), tmp_path / "run", False, Silent())


def test_a_model_without_finite_numbers_is_no_result(
    bert_folder: Path, csv_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights may be finite, and too large for its logits."""
    from fedlora.training.batched import Trainer

    logits = Trainer.logits
    monkeypatch.setattr(Trainer, "logits", lambda self, asked: (np.full_like(x, np.nan) for x in logits(self, asked)))
    tables = {"model": {"source": str(bert_folder)}, "data": {"source": str(csv_folder)}, "clients": {"count": 2, "rank": 2}}
    config = resolve(tables, {"train": {"rounds": 2}})
    for resume in (False, True):  # it stays so
        with pytest.raises(RunFailed, match=r"round 2: the model gives no finite numbers"):
            play.execute(config, tmp_path / "run", resume, Silent())
    assert not (tmp_path / "run" / "adapter").exists() and read_rows(tmp_path / "run")[-1]["undecided"] == 45


@pytest.mark.parametrize("head", ["frozen", "personal"])
def test_the_commonest_class_and_the_confusion_of_a_round(head: str, bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    config = resolve(
        {
            "precision": "fp32",
            "method": {"name": "fedit"},
            "model": {"source": str(bert_folder), "head": head},
            "data": {"source": str(csv_folder), "alpha": 0.3},
            "clients": {"count": 3, "rank": 2},
            "train": {"rounds": 2},
        }
    )
    summary = play.execute(config, tmp_path / "run", False, Silent())
    row = read_rows(tmp_path / "run")[-1]
    dataset = load(config.data, config.seed)
    parts = deal(dataset, config.data, config.clients, config.seed)
    everybody = [(np.arange(len(dataset.train)), np.arange(len(dataset.test)))]
    right = count = 0
    for train, test in everybody if head == "frozen" else zip(parts.train, parts.test, strict=True):
        own = [dataset.train.labels[i] for i in train]
        commonest = max(range(3), key=own.count)
        right += sum(dataset.test.labels[i] == commonest for i in test)
        count += len(test)
    assert row["commonest_accuracy"] == pytest.approx(right / count)
    assert summary["final"]["commonest_accuracy"] == row["commonest_accuracy"]
    table = load_file(tmp_path / "run" / "arrays" / "round-00002.safetensors")["confusion"]
    assert table.sum() == count and np.trace(table) / count == pytest.approx(row["accuracy"])
    assert table.sum(1).tolist() == np.bincount(dataset.test.labels, minlength=3).tolist()
    assert not (tmp_path / "run" / "arrays" / "round-00001.safetensors").exists() or "confusion" not in load_file(
        tmp_path / "run" / "arrays" / "round-00001.safetensors"
    )
