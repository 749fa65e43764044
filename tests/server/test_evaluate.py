"""What a round's scores are of: counted again by hand from the answers that models give."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import TASK, Silent, load
from toy import federate, make_clients, make_setup

from fedlora.config import resolve
from fedlora.data.dataset import Schema
from fedlora.data.domains import deal
from fedlora.errors import RunFailed
from fedlora.gather.mean import Mean
from fedlora.messages import TEST, Answer, Behind, Body, Forgot, Lost, ScoreAsk, Scored
from fedlora.methods.fedsa_lora import FedSALoRA
from fedlora.runs import play
from fedlora.server.evaluate import Panel, evaluate
from fedlora.server.loop import Federation, Server
from fedlora.summary import read_rows
from fedlora.tasks import classification

SCORING = TASK.bind(Schema(("a", "b")))


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
    confusion = classification.confusion
    monkeypatch.setattr(classification, "confusion", lambda logits, labels: confusion(np.full_like(logits, np.nan), labels))
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
        own = [dataset.train.targets[i] for i in train]
        commonest = max(range(3), key=own.count)
        right += sum(dataset.test.targets[i] == commonest for i in test)
        count += len(test)
    assert row["commonest_accuracy"] == pytest.approx(right / count)
    assert summary["final"]["commonest_accuracy"] == row["commonest_accuracy"]
    table = load_file(tmp_path / "run" / "arrays" / "round-00002.safetensors")["confusion"]
    assert table.sum() == count and np.trace(table) / count == pytest.approx(row["accuracy"])
    assert table.sum(1).tolist() == np.bincount(dataset.test.targets, minlength=3).tolist()
    assert not (tmp_path / "run" / "arrays" / "round-00001.safetensors").exists() or "confusion" not in load_file(
        tmp_path / "run" / "arrays" / "round-00001.safetensors"
    )


# ---- clients elsewhere ------------------------------------------------------------------------------------------------------


def sums(right: int, wrong: int) -> dict[str, torch.Tensor]:
    return {"confusion": torch.tensor([[right, wrong, 0], [0, 0, 0]]), "commonest": torch.tensor([wrong])}


class Scripted:
    """Answers of clients to being scored, by exchange."""

    def __init__(self, *bodies: dict[int, Body]) -> None:
        self.bodies, self.asks = bodies, list[Sequence[ScoreAsk]]()

    def exchange(self, asks: Sequence[ScoreAsk]) -> Iterator[Answer]:
        self.asks.append(asks)
        return (Answer(asks[0].envelope, id, body) for id, body in self.bodies[len(self.asks) - 1].items())

    def close(self) -> None: ...


def scored(transport: Scripted) -> dict[str, Any]:
    """The row of a personal method after a round in which clients 0 and 1 of three took part."""
    method, setup = FedSALoRA(), make_setup(make_clients((2, 2, 2)))
    state = federate(method, setup, 1, lambda t: setup.clients[:2]).states[-1]
    federation = Federation(method, setup, transport, Mean(method, setup), lambda t: setup.clients)
    row, _ = evaluate(federation, Server(1, state, accepted={0: 1, 1: 1}), Panel({TEST: setup.clients}, True, transport, SCORING))
    return row


def test_clients_are_asked_for_their_own_models_and_who_never_took_part_for_the_common_one() -> None:
    transport = Scripted({0: Scored(sums(3, 1)), 2: Scored(sums(0, 4)), 1: Scored(sums(2, 0))})
    row = scored(transport)
    (asks,) = transport.asks
    assert [(ask.client.id, ask.held, ask.model is None, ask.down is None) for ask in asks] == [
        (0, 1, True, False),
        (1, 1, True, False),
        (2, 0, False, True),
    ]
    assert row["accuracy"] == 5 / 10 and row["client_accuracy"] == {"0": 3 / 4, "1": 1.0, "2": 0.0}
    assert (row["clients_scored"], row["examples_scored"], row["clients_untrained"]) == (3, 10, 1)
    assert row["commonest_accuracy"] == 5 / 10 and row["evaluate_bytes"] > 0 and "clients_not_scored" not in row


@pytest.mark.parametrize(
    "body",
    [
        Scored({}),
        Scored({**sums(1, 1), "more": torch.tensor([1])}),
        Scored({**sums(1, 1), "confusion": torch.ones(3, 4, dtype=torch.int64)}),
        Scored({**sums(1, 1), "confusion": torch.full((2, 3), 0.5)}),
        Scored(sums(5, -1)),
        Scored({"confusion": [1, 2], "commonest": 1}),
        Lost("gone"),
        Behind(3),
        None,
    ],
    ids=str,
)
def test_sums_that_cannot_be_are_left_out_and_named(body: Any) -> None:
    answers = {0: Scored(sums(3, 1)), 1: body, 2: Scored(sums(1, 3))}
    row = scored(Scripted({id: each for id, each in answers.items() if each is not None}, {}))
    assert row["accuracy"] == 4 / 8 and row["clients_not_scored"] == [1] and row["clients_scored"] == 2


def test_who_forgot_what_it_kept_is_scored_as_one_that_never_took_part() -> None:
    transport = Scripted({0: Scored(sums(3, 1)), 1: Forgot(), 2: Scored(sums(1, 3))}, {1: Scored(sums(1, 0))})
    row = scored(transport)
    (ask,) = transport.asks[1]
    assert (ask.client.id, ask.held, ask.down) == (1, 0, None) and ask.model is not None
    assert row["examples_scored"] == 9 and transport.asks[0][0].envelope != ask.envelope


def test_without_any_answer_there_is_no_score() -> None:
    row = scored(Scripted({}))
    assert np.isnan(row["accuracy"]) and row["clients_not_scored"] == [0, 1, 2] and row["client_accuracy"] == {}
