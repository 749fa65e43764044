"""Clients that never train: the model that is written is scored on their own test examples, and nothing that they have touches it.

The measure is plain transformers and PEFT on one text at a time, with scores by scikit-learn.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import tiny
import tomli_w
import torch
import transformers
from matplotlib import image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from tiny import Silent, load

from fedlora.clients.worker import Worker
from fedlora.comparison.check import check
from fedlora.comparison.grid import expand
from fedlora.comparison.recipe import Header, Recipe
from fedlora.config import Config, as_tables, resolve
from fedlora.data.domains import deal
from fedlora.errors import BadInput
from fedlora.messages import Answer, Ask, Lost, Scored
from fedlora.runs import play
from fedlora.runs.worker import processes
from fedlora.summary import in_words, read_rows
from fedlora.tasks.metrics import CLASSIFICATION
from fedlora.transports.inprocess import InProcess

SLOW = pytest.mark.slow
TRAIN = {"rounds": 3, "batch_size": 8, "lr": 2e-2, "epochs": 3}
OWNERS = ("ann", "bob", "cem", "dee", "eve")


@pytest.fixture
def base(bert_folder: Path, csv_folder: Path) -> dict[str, Any]:
    return {
        "precision": "fp32",
        "method": {"name": "fedit"},
        "model": {"source": str(bert_folder), "head": "shared"},
        "data": {"source": str(csv_folder), "alpha": 1.0},
        "clients": {"count": 5, "rank": 2, "held_out": 2},
        "train": TRAIN,
    }


def table(folder: Path) -> dict[str, Any]:
    """federation.json of a run."""
    return json.loads((folder / "federation.json").read_text())


def names_held_out(folder: Path) -> list[str]:
    return [each["name"] for each in table(folder)["held_out"]]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same_adapter(one: Path, two: Path) -> bool:
    a, b = adapter(one), adapter(two)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def by_peft(folder: Path, bert: Path, texts: list[str]) -> list[int]:
    """The classes that plain PEFT gives to texts with a run's adapter, each text alone."""
    words = transformers.AutoTokenizer.from_pretrained(bert)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    with torch.no_grad():
        return [int(model(**words(text, return_tensors="pt")).logits.argmax()) for text in texts]


def by_hand(config: Config, folder: Path, bert: Path) -> dict[str, Any]:
    """What a summary must say of the clients that federation.json names as held out. Who has what is as if nobody was held out."""
    dataset = load(config.data, config.seed)
    everybody = config.clients.model_copy(update={"held_out": None})
    parts = deal(dataset, config.data, everybody, config.seed)
    names = names_held_out(folder)
    own = {name: parts.test[parts.names.index(name)] for name in names}
    rows = [int(row) for name in names for row in own[name]]
    taken = dict(zip(rows, by_peft(folder, bert, [dataset.test.inputs[row] for row in rows]), strict=True))
    labels, said = [int(dataset.test.targets[row]) for row in rows], [taken[row] for row in rows]
    trained = [int(dataset.train.targets[row]) for k, name in enumerate(parts.names) if name not in names for row in parts.train[k]]
    commonest = max(range(3), key=trained.count)
    return {
        "clients": len(names),
        "examples": len(rows),
        "accuracy": accuracy_score(labels, said),
        "macro_f1": f1_score(labels, said, average="macro", zero_division=0.0),
        "commonest_accuracy": labels.count(commonest) / len(labels),
        "client_accuracy": {
            name: accuracy_score([dataset.test.targets[row] for row in own[name]], [taken[row] for row in own[name]])
            for name in names
        },
    }


def equal(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got.keys() == wanted.keys() | {"metric", "score"} and got["metric"] == "accuracy" and got["score"] == got["accuracy"]
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value), key


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("fedit", "shared"),
        ("ffa-lora", "personal"),  # what its clients hold depends on their ranks, which held-out ones have not
        *(pytest.param(name, head, marks=SLOW) for name in ("feddpa", "fl-tac") for head in ("frozen", "shared", "personal")),
        *(pytest.param(name, "personal", marks=SLOW) for name in ("fedit", "florist")),
    ],
)
def test_the_adapter_of_a_run_gives_the_scores_of_those_who_never_trained(
    method: str, head: str, base: dict[str, Any], bert_folder: Path, tmp_path: Path
) -> None:
    """Whatever clients keep for themselves, these have the common model alone, and the seed's head where each has its own."""
    config = resolve(base, {"method": {"name": method}, "model": {"head": head}})
    summary = play.execute(config, tmp_path / "run", False, Silent())
    wanted = by_hand(config, tmp_path / "run", bert_folder)
    assert wanted["clients"] == 2 and wanted["examples"] > 9
    equal(summary["held_out"], wanted)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"] == summary["held_out"]
    if (method, head) == ("fedit", "shared"):
        assert summary["held_out"]["accuracy"] > 0.5  # it has learned something


# ---- they never train --------------------------------------------------------------------------------------------------


def write(folder: Path, train: dict[str, int], test: dict[str, int], changed: tuple[str, ...] = ()) -> str:
    """Files with so many examples of each owner; those of `changed` have other training texts."""
    folder.mkdir()
    for part, sizes, seed in (("train", train, 1), ("test", test, 2)):
        with open(folder / f"{part}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label", "owner"])
            for owner, count in sizes.items():
                for text, label in zip(*tiny.examples(count, 10 * seed + OWNERS.index(owner)), strict=True):
                    rows.writerow([f"{text} w7 w8" if part == "train" and owner in changed else text, label, owner])
    return str(folder)


def owned(base: dict[str, Any], source: str, held_out: int | None = 2, **data: Any) -> Config:
    """Clients are the owners."""
    tables = base | {"data": {"source": source, "partition": "column", "column": "owner", **data}}
    return resolve(tables | {"clients": {"rank": 2} | ({"held_out": held_out} if held_out else {})})


SIZES = dict(zip(OWNERS, (30, 18, 24, 20, 28), strict=True))
TEST = dict.fromkeys(OWNERS, 9)


@pytest.fixture
def drawn(base: dict[str, Any], tmp_path: Path) -> tuple[str, ...]:
    """The owners that the seed holds out."""
    config = owned(base, write(tmp_path / "any", SIZES, TEST))
    names = deal(load(config.data, 0), config.data, config.clients, 0).names
    assert set(names) == set(OWNERS)
    return names[3:]


def test_a_run_with_held_out_clients_is_one_of_the_others_alone(
    base: dict[str, Any], drawn: tuple[str, ...], tmp_path: Path
) -> None:
    """In the second folder those who are held out have no training example, so that there are three clients."""
    whole, fewer = tmp_path / "whole", tmp_path / "fewer"
    others = {name: count for name, count in SIZES.items() if name not in drawn}
    play.execute(owned(base, write(tmp_path / "all", SIZES, TEST)), whole, False, Silent())
    play.execute(owned(base, write(tmp_path / "some", others, TEST), None), fewer, False, Silent())
    assert same_adapter(whole, fewer)
    keys = ("round", "loss", "clients", "upload_bytes", "download_bytes", "accuracy", "macro_f1", "commonest_accuracy")
    one, two = ([{key: row[key] for key in keys} for row in read_rows(run)] for run in (whole, fewer))
    assert one == two and [row["clients"] for row in one] == [3, 3, 3]
    assert table(whole)["clients"] == table(fewer)["clients"] and "held_out" not in table(fewer)
    assert [(c["id"], c["name"]) for c in table(whole)["clients"]] == list(enumerate(others))
    assert table(whole)["held_out"] == [{"name": name, "num_examples": SIZES[name], "num_test": 9} for name in drawn]


def test_other_texts_of_a_held_out_client_change_nothing_and_of_another_one_something(
    base: dict[str, Any], drawn: tuple[str, ...], tmp_path: Path
) -> None:
    """Nor do they say which round is the best by validation."""
    other = next(name for name in OWNERS if name not in drawn)
    summaries = {}
    for name, changed in {"plain": (), "aside": drawn, "other": (other,)}.items():
        source = write(tmp_path / f"{name}-data", SIZES, TEST, changed)
        summaries[name] = play.execute(owned(base, source, validation=0.3), tmp_path / name, False, Silent())
    assert same_adapter(tmp_path / "plain", tmp_path / "aside") and not same_adapter(tmp_path / "plain", tmp_path / "other")
    assert summaries["plain"]["held_out"] == summaries["aside"]["held_out"]
    scores = [[row["validation_accuracy"] for row in read_rows(tmp_path / name)] for name in ("plain", "aside")]
    assert scores[0] == scores[1]


def test_their_validation_examples_choose_no_round(
    base: dict[str, Any], drawn: tuple[str, ...], bert_folder: Path, tmp_path: Path
) -> None:
    config = owned(base | {"train": TRAIN | {"rounds": 1}}, write(tmp_path / "data", SIZES, TEST), validation=0.3)
    summary = play.execute(config, tmp_path / "run", False, Silent())
    part = load(config.data, 0).validation
    assert part is not None and set(part.owners) == set(OWNERS)
    rows = [i for i, owner in enumerate(part.owners) if owner not in drawn]
    said = by_peft(tmp_path / "run", bert_folder, [part.inputs[i] for i in rows])
    assert summary["final"]["validation_accuracy"] == pytest.approx(accuracy_score(part.targets[rows], said))
    assert summary["final"]["validation_macro_f1"] == pytest.approx(f1_score(part.targets[rows], said, average="macro"))


# ---- which model, and when ---------------------------------------------------------------------------------------------


@SLOW
@pytest.mark.parametrize("method", ["fedit", "fedloru"])
def test_the_model_that_is_written_is_the_one_that_is_scored(
    method: str, base: dict[str, Any], bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the best round by validation; FedLoRU has merged into the base since."""
    evaluate = play.evaluate
    found = []
    for name, scores in {"first": (0.9, 0.2, 0.1), "last": (0.1, 0.2, 0.9)}.items():

        def scored(federation: Any, server: Any, panel: Any, scores: tuple[float, ...] = scores) -> Any:
            row, confused = evaluate(federation, server, panel)
            return row | {"validation_accuracy": scores[server.round - 1]}, confused

        monkeypatch.setattr(play, "evaluate", scored)
        config = resolve(base, {"method": {"name": method}, "data": {"validation": 0.2}, "train": {"epochs": 1, "patience": 2}})
        summary = play.execute(config, tmp_path / name, False, Silent())
        assert summary["written"] == {"round": 1 if name == "first" else 3, "by": "validation"} and summary["rounds"] == 3
        equal(summary["held_out"], by_hand(config, tmp_path / name, bert_folder))
        found.append(summary["held_out"]["accuracy"])
    assert found[0] != found[1]


@SLOW
@pytest.mark.parametrize("stop", [1, 2])
def test_stopped_and_resumed_it_says_the_same(stop: int, base: dict[str, Any], tmp_path: Path) -> None:
    """Stopped after the last round, too: before the summary."""
    base |= {"train": {"rounds": 2, "batch_size": 8, "lr": 2e-2}}
    config = resolve(base, {"clients": {"count": 8, "held_out": 0.25}})
    whole = play.execute(config, tmp_path / "whole", False, Silent())
    with pytest.raises(KeyboardInterrupt):
        play.execute(config, tmp_path / "parts", False, Silent(stop))
    parts = play.execute(config, tmp_path / "parts", True, Silent())
    assert parts["held_out"] == whole["held_out"] and parts["final"] == whole["final"] and whole["held_out"]["clients"] == 2
    assert same_adapter(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(BadInput, match=r"clients\.held_out was 0\.25, now 3"):
        play.execute(resolve(base, {"clients": {"count": 8, "held_out": 3}}), tmp_path / "parts", True, Silent())


@pytest.mark.parametrize(
    ("clients", "share", "count"), [(8, 0.25, 2), (5, 0.25, 1), (5, 0.01, 1), (6, 0.5, 3), (10, 0.26, 3), (3, 2, 2)]
)
def test_a_share_of_the_clients(clients: int, share: float, count: int, base: dict[str, Any]) -> None:
    """To the nearest number, at least one; whoever is left keeps its order."""
    config = resolve(base, {"clients": {"count": clients, "held_out": share}})
    parts = deal(load(config.data, 0), config.data, config.clients, 0)
    assert parts.held_out == count and len(parts.names) == clients
    assert list(parts.names[:-count]) == sorted(parts.names[:-count], key=lambda name: int(name.split()[1]))
    assert len(set(parts.names)) == clients and np.array_equal(np.sort(np.concatenate(parts.train)), np.arange(90))


@SLOW
def test_by_worker_processes_it_is_the_same(base: dict[str, Any], tmp_path: Path) -> None:
    one = play.execute(resolve(base), tmp_path / "one", False, Silent())
    two = play.execute(resolve(base), tmp_path / "two", False, Silent(), connect=processes(2))
    assert one["held_out"] == two["held_out"]


class Deaf(InProcess):
    """Some clients give no scores."""

    def __init__(self, worker: Worker, ids: tuple[int, ...]) -> None:
        super().__init__(worker)
        self.inputs = ids

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        return (
            replace(answer, body=Lost("gone")) if answer.client in self.inputs and isinstance(answer.body, Scored) else answer
            for answer in super().exchange(asks)
        )


@pytest.mark.parametrize("ids", [(4,), (3, 4)])
def test_who_gives_no_scores_is_named(ids: tuple[int, ...], base: dict[str, Any], bert_folder: Path, tmp_path: Path) -> None:
    """Those that are held out come after the three that train."""
    config = resolve(base, {"train": {"rounds": 1}})
    summary = play.execute(config, tmp_path / "run", False, Silent(), connect=lambda _, worker, out, listener: Deaf(worker, ids))
    names, found = names_held_out(tmp_path / "run"), summary["held_out"]
    assert found["clients_not_scored"] == [names[id - 3] for id in ids] and found["clients"] == 2 - len(ids)
    told = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)["held_out"]  # nan is no JSON
    assert told == found
    if len(ids) == 2:
        assert found["accuracy"] is None and "held-out clients -" in in_words(summary, CLASSIFICATION)
    else:
        wanted = by_hand(config, tmp_path / "run", bert_folder)["client_accuracy"]
        assert found["accuracy"] == pytest.approx(wanted[names[0]])


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clients", "says"),
    [
        ({"held_out": 0}, r"clients\.held_out = 0.*: a share lies in \(0, 1\), a number of clients is an integer above 0"),
        ({"held_out": -1}, r"clients\.held_out = -1.*: a share lies in \(0, 1\), a number of clients is an integer above 0"),
        ({"held_out": 1.0}, r"clients\.held_out = 1\.0: a share lies in \(0, 1\), a number of clients is an integer above 0"),
        ({"held_out": 1.5}, r"clients\.held_out = 1\.5: a share lies in \(0, 1\), a number of clients is an integer above 0"),
        ({"held_out": True}, r"clients\.held_out = True: true and false are no numbers"),
        ({"held_out": 5}, r"clients\.held_out = 5: the run has 5 clients, and one at least must train"),
        ({"held_out": 0.95}, r"clients\.held_out = 0\.95: the run has 5 clients, and one at least must train"),
        ({"held_out": 2, "sample": 4}, r"clients\.sample = 4: the run has 3 clients that train; a share up to 1\.0 is possible"),
        ({"held_out": 2, "rank": [1, 2, 3, 4, 5]}, r"clients\.rank lists 5 ranks for 3 clients that train"),
    ],
)
def test_what_cannot_be_is_one_line(clients: dict[str, Any], says: str, base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=says) as error:
        play.execute(resolve(base, {"clients": clients}), tmp_path / "run", False, Silent())
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_somebody_who_is_held_out_must_have_a_test_example(base: dict[str, Any], drawn: tuple[str, ...], tmp_path: Path) -> None:
    """Found out before a comparison starts, too."""
    config = owned(base, write(tmp_path / "data", SIZES, {name: 9 for name in OWNERS if name not in drawn}))
    says = rf"clients\.held_out = 2: none that is held out has a test example \({drawn[0]} and 1 more\); hold out more clients"
    with pytest.raises(BadInput, match=says):
        play.execute(config, tmp_path / "run", False, Silent())
    assert not (tmp_path / "run").exists()
    grid = expand(Recipe(Header(name="one"), as_tables(config) | {"transform": [[]]}, None, None))
    with pytest.raises(BadInput, match=says):
        check(grid, grid.cells)
    one = owned(base, write(tmp_path / "one", SIZES, {name: 9 for name in OWNERS if name != drawn[0]}))
    summary = play.execute(one, tmp_path / "run", False, Silent())  # one of the two has some
    assert summary["held_out"]["clients"] == 1 and list(summary["held_out"]["client_accuracy"]) == [drawn[1]]


# ---- where it is said --------------------------------------------------------------------------------------------------


def test_the_split_says_who_is_held_out(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = tiny.console(monkeypatch, capsys, tmp_path)
    source, options = base["data"]["source"], ("--clients", "5", "--alpha", "1.0", "--set", "clients.held_out=2")
    status, out, err = call("data", source, *options, "--picture", "split.png")
    assert status == 0 and not err and "5 clients, 2 of them held out" in out
    marked = [line.split(" (held out)")[0] for line in out.splitlines() if "(held out)" in line]
    play.execute(resolve(base, {"train": {"rounds": 1}}), tmp_path / "run", False, Silent())
    assert marked == names_held_out(tmp_path / "run") and len(marked) == 2
    # The run's picture is that of the command.
    assert np.array_equal(image.imread(tmp_path / "split.png"), image.imread(tmp_path / "run" / "split.png"))


@SLOW
def test_the_last_line_the_report_and_the_results_say_it(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = tiny.console(monkeypatch, capsys, tmp_path)
    (tmp_path / "one.toml").write_text(tomli_w.dumps(base))
    status, out, _ = call("run", "one.toml", "--out", "run", "--quiet")
    held_out = json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"]
    said = f"{100 * held_out['accuracy']:.1f}"
    assert status == 0 and f"  held-out clients {said} %  " in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "accuracy on clients that never trained, %" in page and f">{said}<" in page
    grid = base | {"title": "Two", "clients": base["clients"] | {"held_out": [1, 2]}}
    (tmp_path / "two.toml").write_text(tomli_w.dumps(grid))
    status, _, err = call("compare", "two.toml", "--out", "two", "--jobs", "1", "--quiet")
    assert status == 0, err
    found = {
        row["clients.held_out"]: row["held_out_accuracy"] for row in pq.read_table(tmp_path / "two" / "results.parquet").to_pylist()
    }
    assert found.keys() == {1, 2} and found[2] == held_out["accuracy"]
    assert call("report", "run", "--html", "page.html")[0] == 0
    assert "accuracy on clients that never trained, %" in (tmp_path / "page.html").read_text()
