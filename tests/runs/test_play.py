"""Whole runs on a tiny model: what they leave, how they resume, what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import Silent
from toy import tensors

from fedlora import methods
from fedlora.clients.worker import Worker
from fedlora.config import Config, resolve
from fedlora.disk import alone
from fedlora.errors import BadInput, RunFailed
from fedlora.gather import mean
from fedlora.runs import play
from fedlora.runs.export import export, read_result
from fedlora.runs.predict import predict
from fedlora.runs.prepare import make_method
from fedlora.server import checkpoint
from fedlora.summary import read_rows

TIMES = {"wall_s", "train_s", "evaluate_s", "aggregate_s", "wire_s", "other_s"}


@pytest.fixture
def base(bert_folder: Path, csv_folder: Path) -> dict:
    return {
        "precision": "fp32",
        "model": {"source": str(bert_folder)},
        "data": {"source": str(csv_folder), "alpha": 1.0},
        "clients": {"count": 4, "rank": 2},
        "train": {"rounds": 4, "batch_size": 8, "lr": 5e-3},
    }


def configure(base: dict, **tables: dict) -> Config:
    return resolve(base, tables)


def rows_of(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out)]


def result_of(out: Path) -> dict[str, torch.Tensor]:
    if json.loads((out / "summary.json").read_text())["result"] == "checkpoint":  # a model that depends on the input has no other
        config = resolve(tomllib.loads((out / "config.toml").read_text()))
        saved = checkpoint.load(out / "checkpoint", make_method(config))
        return dict(enumerate(tensors(saved.server.state)))
    (file,) = [*out.glob("adapter/adapter_model.safetensors"), *out.glob("model/model.safetensors")]
    return load_file(file)


def same(one: Path, two: Path) -> None:
    assert rows_of(one) == rows_of(two)
    a, b = result_of(one), result_of(two)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


HEADS = ("frozen", "shared", "personal")


def heads_in_turn() -> list[object]:
    """Every method with every head; every eighth method in the fast suite, the heads by turns (tests/test_before.py resumes
    others)."""
    whole = [(i % 8 == 0 and i // 8 % 3 == j, name, head) for i, name in enumerate(methods.names()) for j, head in enumerate(HEADS)]
    return [pytest.param(name, head, marks=() if fast else pytest.mark.slow) for fast, name, head in whole]


@pytest.mark.parametrize(("name", "head"), heads_in_turn())
def test_stopped_and_resumed_equals_uninterrupted(name: str, head: str, base: dict, tmp_path: Path) -> None:
    config = configure(
        base, method={"name": name}, model=base["model"] | {"head": head}, clients={"count": 4, "rank": 2, "sample": 3}
    )
    play.execute(config, tmp_path / "whole", False, Silent())
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            play.execute(config, tmp_path / "parts", stop > 1, Silent(stop))
    play.execute(config, tmp_path / "parts", True, Silent())
    same(tmp_path / "whole", tmp_path / "parts")
    assert [row["round"] for row in rows_of(tmp_path / "whole")] == [1, 2, 3, 4]


def test_more_rounds_continue_a_finished_run(base: dict, tmp_path: Path) -> None:
    play.execute(configure(base), tmp_path / "long", False, Silent())
    short = configure(base, train=base["train"] | {"rounds": 2})
    play.execute(short, tmp_path / "short", False, Silent())
    silent = Silent()
    play.execute(short, tmp_path / "short", True, silent)
    assert "nothing to do" in silent.notes[-1]
    play.execute(configure(base), tmp_path / "short", True, Silent())
    assert rows_of(tmp_path / "long") == rows_of(tmp_path / "short")


def test_a_run_that_went_on_leaves_one_result(base: dict, tmp_path: Path) -> None:
    """FedEx-LoRA's residual is a product of factors in the first round and a dense sum later."""
    out, written = tmp_path / "run", []
    for rounds in (1, 4):
        config = configure(base, method={"name": "fedex-lora"}, train=base["train"] | {"rounds": rounds})
        written.append(play.execute(config, out, rounds > 1, Silent())["result"])
        assert [path.name for path in (out / "adapter", out / "model") if path.exists()] == written[-1:]
    assert written == ["adapter", "model"]


def sawtooth(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """The validation part's accuracy in each round, as said here; the test part's is what it is."""
    evaluate = play.evaluate

    def scored(context, server, transport):  # type: ignore[no-untyped-def]
        found, table = evaluate(context, server, transport)
        assert 0 <= found["validation_accuracy"] <= 1
        return found | {"validation_accuracy": scores[server.round - 1]}, table

    monkeypatch.setattr(play, "evaluate", scored)


@pytest.mark.parametrize("method", ["fedsa-lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora-a2", "flora"))])
def test_the_best_round_by_validation_is_what_is_written(
    method: str, base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a run of so many rounds; stopped and resumed, too, and exported later. Every client's own model is that round's."""
    sawtooth(monkeypatch, 0.2, 0.6, 0.6, 0.5, 0.4, 0.9)
    train = base["train"] | {"rounds": 6, "patience": 3}
    tables = {"method": {"name": method}, "data": base["data"] | {"validation": 0.2}, "train": train}
    summary = play.execute(configure(base, **tables), tmp_path / "whole", False, Silent())
    assert summary["rounds"] == 5 and summary["stopped_early"] and summary["written"] == {"round": 2, "by": "validation"}
    assert summary["final"]["validation_accuracy"] == 0.6
    rows = read_rows(tmp_path / "whole")
    assert len(rows) == 5 and summary["final"]["accuracy"] == rows[1]["accuracy"]
    arrays = load_file(tmp_path / "whole" / "arrays" / "round-00002.safetensors")
    count = len(tiny.load(configure(base, **tables).data, 0).test)
    assert int(arrays["confusion"].sum()) == count

    short = configure(base, **tables | {"train": train | {"rounds": 2}})
    play.execute(short, tmp_path / "short", False, Silent())
    a, b = result_of(tmp_path / "whole"), result_of(tmp_path / "short")
    if method != "lora-a2":  # whose last round depends on how many there are
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    client = 1 if method == "fedsa-lora" else None
    export(tmp_path / "whole", tmp_path / "later", client, False)
    export(tmp_path / "short", tmp_path / "other", client, False)
    a, b = (load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("later", "other"))
    if method != "lora-a2":
        assert all(torch.equal(a[k], b[k]) for k in a)

    out = tmp_path / "parts"
    for stop in (1, 4, 5):
        with pytest.raises(KeyboardInterrupt):
            play.execute(configure(base, **tables), out, stop > 1, Silent(stop))
    play.execute(configure(base, **tables), out, True, Silent())
    same(tmp_path / "whole", out)
    silent = Silent()
    play.execute(configure(base, **tables), out, True, silent)
    assert "nothing to do" in silent.notes[-1]


def test_two_processes_do_not_play_one_run(base: dict, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        play.execute(configure(base), tmp_path / "run", False, Silent(1))
    with alone(tmp_path / "run"), pytest.raises(BadInput, match=r"run is being written by another process"):
        play.execute(configure(base), tmp_path / "run", True, Silent())
    play.execute(configure(base), tmp_path / "run", True, Silent())
    assert len(rows_of(tmp_path / "run")) == 4


@pytest.mark.parametrize("name", ["raflora", "fedavg", "feddpa"])
def test_a_scored_round_says_which_directions_hold_the_energy(name: str, base: dict, tmp_path: Path) -> None:
    """Of one low-rank model for everybody: full fine-tuning and personal models have none."""
    ranks = [1, 2, 3, 3] if name == "raflora" else 2
    train = base["train"] | {"rounds": 3, "evaluate_every": 2}
    play.execute(
        configure(base, method={"name": name}, clients={"count": 4, "rank": ranks}, train=train), tmp_path / "run", False, Silent()
    )
    rows = read_rows(tmp_path / "run")
    if name != "raflora":
        assert not any("energy" in row for row in rows)
        return
    assert ["energy" in row for row in rows] == [False, True, True]
    # The last round's model is the adapter, whose largest rank is 3.
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    squares = np.zeros(3)
    for key in (key for key in adapter if key.endswith("lora_A.weight")):
        A, B = (adapter[k].double().numpy() for k in (key, key.replace("lora_A", "lora_B")))
        squares += np.linalg.svd(B @ A, compute_uv=False)[:3] ** 2
    np.testing.assert_allclose(rows[-1]["energy"], squares / squares.sum(), rtol=1e-4)


def test_a_run_learns_and_leaves_what_it_promises(base: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = configure(
        base, model=base["model"] | {"head": "shared"}, train=base["train"] | {"rounds": 12, "epochs": 3, "lr": 2e-2}
    )
    summary = play.execute(config, out, False, Silent())
    rows = read_rows(out)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and summary["final"]["accuracy"] > 0.6
    assert {"config.toml", "metrics.jsonl", "summary.json", "checkpoint", "adapter", "split.png"} <= set(os.listdir(out))
    promised = (
        "round wall_s train_s loss accuracy macro_f1 upload_params upload_bytes download_params download_bytes clients failed"
    )
    assert set(promised.split()) <= rows[0].keys()
    assert summary["totals"]["upload_bytes"] == sum(row["upload_bytes"] for row in rows)
    # The configuration that a run leaves repeats it.
    import tomllib

    again = resolve(tomllib.loads((out / "config.toml").read_text()))
    assert again == config
    # The run's predictions are those of its adapter.
    texts, labels = tiny.examples(30, 9)
    found = [answer["label"] for answer in predict(out, texts)]
    assert np.mean([a == b for a, b in zip(found, labels, strict=True)]) > 0.6


def test_the_adapter_of_a_run_gives_its_accuracy_under_peft(
    base: dict, csv_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    import csv

    import peft
    import transformers

    out = tmp_path / "run"
    config = configure(base, model=base["model"] | {"head": "shared"}, train=base["train"] | {"rounds": 4, "epochs": 3, "lr": 2e-2})
    summary = play.execute(config, out, False, Silent())
    rows = list(csv.DictReader((csv_folder / "test.csv").read_text().splitlines()))
    words = transformers.AutoTokenizer.from_pretrained(bert_folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=3)
    model = peft.PeftModel.from_pretrained(model, out / "adapter").eval()
    hits = 0
    for row in rows:
        with torch.no_grad():
            hits += int(model(**words(row["text"], return_tensors="pt")).logits.argmax()) == sorted(tiny.CLASSES).index(
                row["label"]
            )
    assert hits / len(rows) == pytest.approx(summary["final"]["accuracy"])


def test_personal_heads_are_scored_and_exported_by_client(base: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = configure(base, model=base["model"] | {"head": "personal"}, method={"name": "fedit"})
    summary = play.execute(config, out, False, Silent())
    row = read_rows(out)[-1]
    sizes = {str(c["id"]): c["num_test"] for c in json.loads((out / "federation.json").read_text())["clients"]}
    mean = sum(row["client_accuracy"][k] * sizes[k] for k in row["client_accuracy"]) / sum(sizes.values())
    assert row["accuracy"] == pytest.approx(mean)
    assert summary["clients"]["worst_tenth"] == min(row["client_accuracy"].values())
    heads = []
    for client in (0, 1):
        assert export(out, tmp_path / f"client{client}", client, False) == "adapter"
        stored = load_file(tmp_path / f"client{client}" / "adapter_model.safetensors")
        heads.append(next(v for k, v in stored.items() if k.endswith("classifier.weight")))
    assert not torch.equal(*heads)


def test_full_fine_tuning_leaves_a_model(base: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = play.execute(configure(base, method={"name": "fedavg"}), out, False, Silent())
    assert summary["result"] == "model" and not (out / "adapter").exists()
    _, roster, result, _ = read_result(out)
    assert (out / "model" / "config.json").exists() and result.full and roster.schema.label_names == tuple(sorted(tiny.CLASSES))


def poison(monkeypatch: pytest.MonkeyPatch, round: int) -> None:
    """Client 1 trains from what is no number in this round."""
    observed = Worker._observed

    def poisoned(self: Worker, run: Any, done: Any) -> bool:
        more = observed(self, run, done)
        if more and (run.ask.round, run.id) == (round, 1):
            slots = {s: replace(f, B={m: b * float("nan") for m, b in f.B.items()}) for s, f in run.request.slots.items()}
            run.request = replace(run.request, slots=slots)
        return more

    monkeypatch.setattr(Worker, "_observed", poisoned)


def test_a_client_that_fails_is_dropped_and_counted(base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 1's training goes to NaN in round 2; the run goes on with the others, and client 1 keeps what it held."""
    poison(monkeypatch, 2)
    out = tmp_path / "run"
    play.execute(configure(base), out, False, Silent())
    rows = read_rows(out)
    assert [row["failed"] for row in rows] == [0, 1, 0, 0] and [row["clients"] for row in rows] == [4, 3, 4, 4]
    assert "finite" in rows[1]["failures"]["1"]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_when_no_reply_counts_the_run_stops_and_can_be_resumed(base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = mean.refuse
    monkeypatch.setattr(
        mean, "refuse", lambda up, method, setup, client: "no" if setup.rounds == 4 else refuse(up, method, setup, client)
    )
    out = tmp_path / "run"
    play.execute(configure(base, train={**base["train"], "rounds": 2}), out, False, Silent())
    with pytest.raises(RunFailed, match=r"^round 3: none of 4 replies counts: client 0: no$"):
        play.execute(configure(base), out, True, Silent())
    assert [row["round"] for row in rows_of(out)] == [1, 2]
    monkeypatch.setattr(mean, "refuse", refuse)
    play.execute(configure(base), out, True, Silent())  # where it stopped, it goes on
    play.execute(configure(base), tmp_path / "whole", False, Silent())
    same(out, tmp_path / "whole")


def test_a_client_that_sends_nothing_keeps_no_adapter_that_diverged(
    base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedDPA-F: in its last rounds clients train their local adapters and send Nothing, so no check of an Up can see this."""
    poison(monkeypatch, 3)
    out = tmp_path / "run"
    method = {"name": "feddpa", "variant": "f", "federated": 0.5}
    play.execute(configure(base, method=method), out, False, Silent())
    rows = read_rows(out)
    assert [row["failed"] for row in rows] == [0, 0, 1, 0] and "finite" in rows[2]["failures"]["1"]
    assert all(row["accuracy"] is not None for row in rows)


@pytest.mark.parametrize("what", ["server", "states", "round"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(what: str, base: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    play.execute(configure(base), tmp_path / "whole", False, Silent())
    with pytest.raises(KeyboardInterrupt):
        play.execute(configure(base), out, False, Silent(3))
    (file,) = out.glob("states/round-00003-*" if what == "states" else f"checkpoint/{what}-00003.*")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    file.write_bytes(damaged if what != "round" else b"{")
    silent = Silent()
    play.execute(configure(base), out, True, silent)
    said = "kept in round 3" if what == "states" else file.name
    assert any(said in note and "round 2" in note for note in silent.notes)
    same(tmp_path / "whole", out)


def test_when_every_checkpoint_is_damaged_it_says_so(base: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        play.execute(configure(base), out, False, Silent(3))
    before = {}
    for file in (out / "checkpoint").glob("server-*"):
        file.write_bytes(b"")
        before[file] = b""
    with pytest.raises(BadInput, match="every checkpoint"):
        play.execute(configure(base), out, True, Silent())


def test_an_existing_folder_is_never_overwritten(base: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(BadInput, match="--resume"):
        play.execute(configure(base), out, False, Silent())
    with pytest.raises(BadInput, match=r"no config\.toml"):
        play.execute(configure(base), out, True, Silent())
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="no run folder"):
        play.execute(configure(base), out, True, Silent())
    assert os.listdir(out) == ["thesis.txt"]


def test_resume_with_another_configuration_is_refused(base: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        play.execute(configure(base), out, False, Silent(1))
    with pytest.raises(BadInput, match=r"train.lr was 0.005, now 0.1"):
        play.execute(configure(base, train=base["train"] | {"lr": 0.1}), out, True, Silent())
    with pytest.raises(BadInput, match="not lowered"):
        play.execute(configure(base, train=base["train"] | {"rounds": 1}), out, True, Silent())


def test_resume_with_other_data_is_refused(base: dict, tmp_path: Path) -> None:
    tiny.save_data(tmp_path)
    config = configure(base, data={"source": str(tmp_path / "train.csv")})
    with pytest.raises(KeyboardInterrupt):
        play.execute(config, tmp_path / "run", False, Silent(1))
    before = (tmp_path / "train.csv").read_text()
    first = before.splitlines()[1]
    for changed, says in (
        (before + "one more,apple\n", "the clients of"),
        (before.replace(first, f"w1 {first}"), "the texts or labels of data.source have changed"),
    ):
        (tmp_path / "train.csv").write_text(changed)
        with pytest.raises(BadInput, match=f"other data: {says}"):
            play.execute(config, tmp_path / "run", True, Silent())


def test_resume_refuses_what_was_changed_by_hand(base: dict, tmp_path: Path) -> None:
    """The configuration that counts is that of the checkpoint: the command line reads config.toml, as here."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        play.execute(configure(base), out, False, Silent(2))
    good = {name: (out / name).read_bytes() for name in ("config.toml", "metrics.jsonl")}
    (out / "config.toml").write_bytes(good["config.toml"].replace(b"lr = 0.005", b"lr = 0.5"))
    with pytest.raises(BadInput, match=r"train.lr was 0.005, now 0.5; .*config.toml was changed"):
        play.execute(resolve(tomllib.loads((out / "config.toml").read_text())), out, True, Silent())
    (out / "config.toml").write_bytes(good["config.toml"])
    for damage, says in (
        (good["metrics.jsonl"].splitlines(keepends=True)[0], "ends with round 1, and the checkpoint is of round 2"),
        (b"{}\n", "line 1 is not the row of round 1"),
    ):
        (out / "metrics.jsonl").write_bytes(damage)
        with pytest.raises(BadInput, match=says):
            play.execute(configure(base), out, True, Silent())
    (out / "metrics.jsonl").write_bytes(good["metrics.jsonl"])
    (out / "summary.json").write_text("{")
    with pytest.raises(BadInput, match=r"summary.json is damaged; delete it, and"):
        play.execute(configure(base), out, True, Silent())
    (out / "summary.json").unlink()
    play.execute(configure(base), out, True, Silent())
    play.execute(configure(base), tmp_path / "whole", False, Silent())
    same(tmp_path / "whole", out)


def test_a_folder_without_checkpoint_starts_afresh(base: dict, tmp_path: Path) -> None:
    play.execute(configure(base), tmp_path / "whole", False, Silent())
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        play.execute(configure(base), out, False, Silent(1))
    shutil.rmtree(out / "checkpoint")
    play.execute(configure(base), out, True, Silent())
    same(tmp_path / "whole", out)


def test_patience_needs_a_validation_part(base: dict, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"train\.patience = 3 needs a validation part: data\.validation"):
        play.execute(configure(base, train=base["train"] | {"patience": 3}), tmp_path / "run", False, Silent())
    assert not list(tmp_path.iterdir())


def test_refused_before_anything_is_written(base: dict, tmp_path: Path) -> None:
    for tables, says in (
        ({"method": {"name": "fedit"}, "clients": {"count": 4, "rank": [1, 2, 4, 8]}}, "FedIT"),
        ({"clients": {"count": 4, "rank": 17}}, "17 is above 16"),
        ({"clients": {"count": 4, "rank": [1, 2]}}, "lists 2 ranks for 4 clients"),
        ({"clients": {"count": 400}}, "400"),
        ({"method": {"name": "lora-a2", "probe_counts": True}}, "probe_counts"),
        ({"model": base["model"] | {"target_modules": ["q_proj"]}}, "q_proj"),
    ):
        with pytest.raises(BadInput, match=says):
            play.execute(configure(base, **tables), tmp_path / "run", False, Silent())
        assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_a_resumable_run(base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play.execute(configure(base), tmp_path / "whole", False, Silent())
    out = tmp_path / "run"
    write, calls = checkpoint.write_all, []

    def full(files: dict[Path, bytes]) -> None:
        path, data = next(iter(files.items()))
        if path.name == "server-00003.fed":
            calls.append(path)
            path.with_name(path.name + ".part").write_bytes(data[:100])
            raise OSError(28, "No space left on device", str(path))
        write(files)

    monkeypatch.setattr(checkpoint, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        play.execute(configure(base), out, False, Silent())
    assert calls
    monkeypatch.setattr(checkpoint, "write_all", write)
    play.execute(configure(base), out, True, Silent())
    same(tmp_path / "whole", out)


@pytest.mark.parametrize(
    ("method", "kills"),
    [pytest.param(name, 7, marks=pytest.mark.slow) for name in ("lora-a2", "feddpa", "flora")],
)
def test_kill_at_any_moment_and_resume(method: str, kills: int, base: dict, tmp_path: Path) -> None:
    """A process is killed at random moments, then left to finish: nothing differs from a run in peace."""
    from fedlora.config import to_toml

    config = configure(base, method={"name": method}, train=base["train"] | {"rounds": 6 * kills})
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    play.execute(config, tmp_path / "whole", False, Silent())
    command = [
        sys.executable,
        "-c",
        "from fedlora.cli import main; main()",
        "run",
        str(tmp_path / "recipe.toml"),
        "--out",
        str(tmp_path / "run"),
    ]
    rng = np.random.default_rng(int(time.time()))
    for _ in range(kills):
        resume = ["--resume"] if (tmp_path / "run").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = len(read_rows(tmp_path / "run"))
        deadline = time.monotonic() + 60
        while len(read_rows(tmp_path / "run")) <= seen and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    play.execute(config, tmp_path / "run", True, Silent())
    same(tmp_path / "whole", tmp_path / "run")
