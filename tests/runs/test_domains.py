"""Whole runs of several domains on a tiny model, and of a model that depends on the input."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import Silent
from toy import same, tensors

from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.runs import play
from fedlora.runs.export import export, read_result
from fedlora.runs.predict import predict
from fedlora.runs.roster import read_roster
from fedlora.summary import read_rows

TIMES = {"wall_s", "train_s", "evaluate_s", "aggregate_s", "wire_s", "other_s"}
TABLES = {
    "precision": "fp32",
    "clients": {"count": 4, "rank": 2},
    "train": {"rounds": 3, "batch_size": 8, "lr": 5e-3},
    "data": {"alpha": 10.0},
}


def rows_of(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out)]


def colours(folder: Path) -> Path:
    """Another domain in the same words: one of two classes, given away by how the text begins."""
    rng = np.random.default_rng(9)
    with open(folder / "colour.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["words", "shade"])
        for i in range(80):
            out.writerow([" ".join([f"w{i % 2}", *rng.choice(tiny.WORDS, 6)]), ("dark", "light")[i % 2]])
    return folder / "colour.csv"


@pytest.fixture
def two(bert_folder: Path, csv_folder: Path, tmp_path: Path) -> dict:
    data = {"source": [str(csv_folder), str(colours(tmp_path))], "text": ["text", "words"], "label": ["label", "shade"]}
    return TABLES | {"model": {"source": str(bert_folder)}, "data": TABLES["data"] | data}


@pytest.mark.parametrize("name", ["fl-tac", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fedit", "fedlease"))])
def test_stopped_and_resumed_equals_uninterrupted(name: str, two: dict, tmp_path: Path) -> None:
    config = resolve(two, {"method": {"name": name}, "clients": {"domains": 2 if name == "fl-tac" else 1}})
    play.execute(config, tmp_path / "whole", False, Silent())
    with pytest.raises(KeyboardInterrupt):
        play.execute(config, tmp_path / "parts", False, Silent(2))
    play.execute(config, tmp_path / "parts", True, Silent())
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    one, other = (read_result(tmp_path / part)[2] for part in ("whole", "parts"))
    assert tensors(one) and same(one, other)
    again = Silent()
    play.execute(config, tmp_path / "parts", True, again)
    assert "nothing to do" in again.notes[-1]
    rows = read_rows(tmp_path / "whole")
    assert rows[-1]["loss"] < rows[0]["loss"] and all(row["failed"] == 0 for row in rows)


@pytest.mark.parametrize("name", ["fedit", "fl-tac"])
def test_accuracy_by_domain_adds_up_to_the_whole(name: str, two: dict, tmp_path: Path) -> None:
    config = resolve(two, {"method": {"name": name}})
    summary = play.execute(config, tmp_path / "run", False, Silent())
    context = play.prepare(config, Silent())
    counts = np.bincount(context.dataset.test.domains)
    for row in rows_of(tmp_path / "run"):
        by_domain = row["domain_accuracy"]
        assert (
            list(by_domain)
            == [domain.name for domain in context.dataset.domains]
            == [Path(two["data"]["source"][0]).name, "colour"]
        )
        assert np.average(list(by_domain.values()), weights=counts) == pytest.approx(row["accuracy"])
        assert all(0 <= value <= 1 for value in by_domain.values())
        # With its own logits only, colour is a choice between two: wrong classes of the other domain are no answer.
        assert by_domain["colour"] > 0.2
    if name == "fedit":  # from the logits of the finished model, cut to each domain's own range by hand
        _, _, model, head = read_result(tmp_path / "run")
        logits = tiny.logits(context.trainer, model, head, replace(context.test, domains=context.test.domains[:0]))
        for t, domain in enumerate(context.dataset.domains):
            rows = context.dataset.test.domains == t
            best = logits[rows, domain.first : domain.first + domain.count].argmax(axis=1) + domain.first
            assert by_domain[domain.name] == pytest.approx((best == context.dataset.test.targets[rows]).mean())
    roster = read_roster(tmp_path / "run" / "federation.json")
    assert roster == context.roster and [list(c.domains) for c in roster.clients] == [
        [t.name for t in roster.schema.domains][k % 2 :][:1] for k in range(4)
    ]
    assert sum(sum(c.domains.values()) for c in roster.clients) == len(context.dataset.train)
    assert summary["result"] == "adapter"
    right = 0
    for (
        domain
    ) in context.dataset.domains:  # predict is the model that was scored: on the texts of each data set, by each client's own
        for client in context.setup.clients if name == "fl-tac" else [None]:
            dealt = context.parts.test[client.id] if client else np.arange(len(context.dataset.test))
            where = [i for i in dealt if context.dataset.test.domains[i] == context.dataset.domains.index(domain)]
            texts = [context.dataset.test.inputs[i] for i in where]
            found = predict(tmp_path / "run", texts, client=client and client.id, domain=domain.name) if texts else []
            assert all(answer["label"].startswith(f"{domain.name}/") for answer in found)
            right += sum(
                answer["label"] == context.dataset.schema.label_names[context.dataset.test.targets[i]]
                for i, answer in zip(where, found, strict=True)
            )
    assert right / len(context.dataset.test) == pytest.approx(rows_of(tmp_path / "run")[-1]["accuracy"])


def test_the_adapter_of_one_client_is_its_clusters(two: dict, tmp_path: Path) -> None:
    config = resolve(two, {"method": {"name": "fl-tac"}})
    play.execute(config, tmp_path / "run", False, Silent())
    for client in range(4):
        assert export(tmp_path / "run", tmp_path / f"to{client}", client, False) == "adapter"
    one, other = (load_file(tmp_path / f"to{client}" / "adapter_model.safetensors") for client in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)  # of different domains


def test_the_upload_is_an_adapter_a_domain(two: dict, tmp_path: Path) -> None:
    sent = {}
    for each in (1, 2):
        play.execute(
            resolve(two, {"method": {"name": "fl-tac"}, "clients": {"domains": each}}), tmp_path / str(each), False, Silent()
        )
        sent[each] = rows_of(tmp_path / str(each))[0]["upload_params"]
    assert sent[2] == 2 * sent[1] > 0


def test_a_client_of_several_domains_has_no_one_adapter_to_export(two: dict, tmp_path: Path) -> None:
    config = resolve(two, {"method": {"name": "fl-tac"}, "clients": {"domains": 2}})
    play.execute(config, tmp_path / "run", False, Silent())
    with pytest.raises(BadInput, match="for each input") as error:
        export(tmp_path / "run", tmp_path / "to", 0, False)
    assert "\n" not in str(error.value) and not (tmp_path / "to").exists()
    assert export(tmp_path / "run", tmp_path / "common", None, False) == "adapter"


def test_a_routed_result_is_in_the_checkpoint_only_and_predicts(bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    base = TABLES | {"model": {"source": str(bert_folder)}, "data": TABLES["data"] | {"source": str(csv_folder)}}
    config = resolve(base, {"method": {"name": "fedlease", "experts": 2}})
    summary = play.execute(config, tmp_path / "run", False, Silent())
    assert summary["result"] == "checkpoint" == json.loads((tmp_path / "run" / "summary.json").read_text())["result"]
    assert (tmp_path / "run" / "checkpoint").is_dir()
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "model").exists()
    for client, merged in ((None, False), (None, True), (1, False)):
        with pytest.raises(BadInput, match="for each input") as error:
            export(tmp_path / "run", tmp_path / "to", client, merged)
        assert "\n" not in str(error.value) and not (tmp_path / "to").exists()
    (answer,) = predict(tmp_path / "run", ["w1 apple w2"], client=1)
    assert answer["label"] in tiny.CLASSES and 0 < answer["probability"] <= 1
    _, _, model, _ = read_result(tmp_path / "run", 1)
    assert model.gate.own in model.slots and len(model.slots) == 2


def test_one_expert_is_a_plain_adapter(bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    base = TABLES | {"model": {"source": str(bert_folder)}, "data": TABLES["data"] | {"source": str(csv_folder)}}
    summary = play.execute(resolve(base, {"method": {"name": "fedlease", "experts": 1}}), tmp_path / "run", False, Silent())
    assert summary["result"] == "adapter" and (tmp_path / "run" / "adapter").is_dir()


def test_one_bad_source_is_one_line_and_leaves_nothing(two: dict, tmp_path: Path) -> None:
    config = resolve(two, {"data": two["data"] | {"label": ["label", "no such column"]}})
    with pytest.raises(BadInput, match="no such column") as error:
        play.execute(config, tmp_path / "run", False, Silent())
    assert "colour.csv" in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()
