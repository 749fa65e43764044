"""Whole runs of language models: what is exported gives the run's scores under plain transformers and PEFT; every method plays."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedlora import methods
from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.runs.export import export
from fedlora.runs.play import execute
from fedlora.runs.predict import choose, load, predict
from fedlora.summary import read_rows
from fedlora.tasks import defaults
from fedlora.tasks.language import extracted, matches
from fedlora.training.score import ScoreJob

SCRIPT = Path(__file__).with_name("load_causal.py")
MERGE = ["fedex-lora", "flora", "fedloru", "pfedloru", "mfedloru", "frlora"]  # into the base
PATTERN = r"#### (-?[0-9.,]+)"


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Sums, asked and answered: sum, difference, and words of other lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        a, b = (int(x) for x in rng.integers(1, 10, 2))
        found.append((f"{a} and {b}?", f"{a + b}{'!' * int(rng.integers(0, 9))} #### {a + b}"))
    return found


def save_data(folder: Path, train: int = 48, test: int = 12) -> Path:
    folder.mkdir()
    for part, count, seed in (("train", train, 1), ("test", test, 2)):
        lines = [json.dumps({"question": q, "answer": a, "owner": f"site {i % 3}"}) for i, (q, a) in enumerate(pairs(count, seed))]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def save_model(folder: Path, name: str = "llama/tied") -> Path:
    model, tokenizer = architectures.causal(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tables(folder: Path, *layers: dict[str, Any]) -> Any:
    common: dict[str, Any] = {
        "precision": "fp32",
        "task": {"name": "causal_lm", "max_new_tokens": 8},
        "method": {"name": "fedit"},
        "model": {"source": str(folder / "base")},
        "data": {"source": str(folder / "sums"), "partition": "column", "column": "owner", "max_length": 64},
        "clients": {"rank": 2},
        "train": {"rounds": 2, "lr": 0.02, "batch_size": 8},
    }
    return resolve(defaults(common), common, *layers)


def run(folder: Path, *layers: dict[str, Any], out: str = "run", name: str = "llama/tied") -> dict[str, Any]:
    if not (folder / "sums").exists():
        save_data(folder / "sums")
    if not (folder / "base").exists():
        save_model(folder / "base", name)
    return execute(tables(folder, *layers), folder / out, False, tiny.Silent())


def read(
    folders: dict[str, Path], place: Path, version: str | None = None, quantise: dict[str, str] | None = None
) -> dict[str, tuple[np.ndarray, str]]:
    """What a process without fedlora makes of exported folders: losses of the test pairs, and an answer to the first prompt.

    Args:
        quantise: name -> in how many bits its base is there.
        version: of PEFT, in a folder beside the installed one that `scripts/setup` makes.
    """
    environment = dict(os.environ)
    if version is not None:
        assert (Path(sys.prefix) / f"peft-{version}").is_dir(), f"PEFT {version} is missing: run scripts/setup"
        environment["PYTHONPATH"] = str(Path(sys.prefix) / f"peft-{version}")
    asked = [(f"{q}\n", a) for q, a in pairs(12, 2)]  # a line break ends a question, as GSM8K's own code has it
    job = {"folders": {name: str(x) for name, x in folders.items()}, "pairs": asked, "quantise": quantise or {}}
    (place / "job.json").write_text(json.dumps(job))
    command = [sys.executable, SCRIPT, place / "job.json", place / "answer.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert version in (None, done.stdout.strip())
    return {name: (np.array(x), text) for name, (x, text) in json.loads((place / "answer.json").read_text()).items()}


def own_losses(folder: Path, client: int | None = None, **changes: Any) -> np.ndarray:
    """The same losses through the slots; `changes` are of the model's configuration."""
    choice = choose(folder, client)
    config = choice.config
    config = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    model = load(replace(choice, config=config))
    data = model.task.encode(model.pretrained, scored_part(folder), model.limit)
    (found,) = model.trainer.outputs([ScoreJob(model.choice.model, model.choice.head, data)])
    return found[:, 0]


def scored_part(folder: Path) -> Any:
    from fedlora.config import read_run
    from fedlora.data.load import load as load_data
    from fedlora.runs.prepare import make_task

    config = read_run(folder)
    return load_data(make_task(config), config.data, config.seed).test


def test_a_run_leaves_an_adapter_that_has_its_scores_and_its_answers_under_peft(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    names = ["answer_loss", "perplexity", "token_accuracy", "exact_match", "rouge_l"]
    summary = run(tmp_path, {"task": {"metrics": names, "pattern": PATTERN}})
    assert summary["result"] == "adapter"
    export(tmp_path / "run", tmp_path / "merged", None, merged=True)
    found = read({"adapter": tmp_path / "run" / "adapter", "merged": tmp_path / "merged"}, tmp_path)
    _, tokenizer = architectures.causal("llama")
    tokens = sum(len(tokenizer(a)["input_ids"]) + 1 for _, a in pairs(12, 2))
    final = summary["final"]
    for losses, answer in found.values():
        np.testing.assert_allclose(losses, own_losses(tmp_path / "run"), rtol=1e-4)
        assert final["answer_loss"] == pytest.approx(losses.sum() / tokens, rel=1e-5)
        assert final["perplexity"] == pytest.approx(math.exp(losses.sum() / tokens), rel=1e-4)
        (said,) = predict(tmp_path / "run", [pairs(12, 2)[0][0]])
        assert said["answer"] == answer.strip()
    written = [x["answer"] for x in predict(tmp_path / "run", [q for q, _ in pairs(12, 2)])]
    right = sum(matches(w, a, PATTERN) for w, (_, a) in zip(written, pairs(12, 2), strict=True))
    assert final["exact_match"] == pytest.approx(right / 12)
    before = read_rows(tmp_path / "run")[0]["answer_loss"]
    assert final["answer_loss"] < before
    for place in ("run/adapter", "merged"):  # the code of the card, as it stands there
        monkeypatch.chdir(tmp_path / place)
        capsys.readouterr()
        exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], {})
        assert capsys.readouterr().out.strip()


def test_the_likeliest_choice(tmp_path: Path) -> None:
    """The right one of three, the share by a process without fedlora; ties and lengths by hand in test_language.py."""
    rng, folder = np.random.default_rng(3), tmp_path / "sums"
    folder.mkdir()
    rows = []
    for q, a in pairs(40, 4):
        options = [a, a[::-1], "no"]
        order = rng.permutation(3)
        rows.append({"question": q, "choices": [options[i] for i in order], "answer": int(np.flatnonzero(order == 0)[0])})
    for part, own in (("train", rows[:30]), ("test", rows[30:])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    split = {"data": {"partition": "iid", "column": None}, "clients": {"count": 2}}
    summary = run(tmp_path, {"task": {"metrics": ["choice", "answer_loss"]}, **split})
    asked = [(f"{row['question']}\n", choice) for row in rows[30:] for choice in row["choices"]]
    found = likelihoods(tmp_path / "run" / "adapter", asked).reshape(10, 3)
    right = [int(each.argmax()) == row["answer"] for each, row in zip(found, rows[30:], strict=True)]
    assert summary["final"]["choice"] == pytest.approx(np.mean(right)) and summary["final"]["score"] == summary["final"]["choice"]


def likelihoods(folder: Path, asked: list[tuple[str, str]]) -> np.ndarray:
    """Of each pair the log-likelihood of the completion alone, without an end of text."""
    import peft
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt, completion in asked:
        start, ids = len(tokenizer(prompt)["input_ids"]), torch.tensor(tokenizer(prompt + completion)["input_ids"])
        with torch.no_grad():
            logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        found.append(sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids))))
    return np.array(found)


def test_what_counts_in_an_exact_match() -> None:
    """GSM8K's convention: the number behind ####, without commas; the last one where there are several."""
    assert extracted("so 2 #### 1,234.", PATTERN) == "1234" and extracted("#### 1 #### 2", PATTERN) == "2"
    assert extracted("no number", PATTERN) is None and extracted(" a b ", None) == "a b"
    assert matches("#### 1,000", "... #### 1000", PATTERN) and not matches("", "#### 3", PATTERN) and not matches("", "", PATTERN)
    assert extracted("The answer: (B)", r"\(([A-D])\)") == "B" and extracted("yes yes", "yes") == "yes"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": {"metrics": ["blue"]}}, "unknown metric 'blue'"),
        ({"task": {"metrics": []}}, "at least one of answer_loss"),
        ({"task": {"pattern": "("}}, "not a regular expression"),
        ({"task": {"max_new_tokens": 0}}, "max_new_tokens must be at least 1"),
        ({"task": {"shape": "table"}}, "unknown shape 'table'"),
        ({"task": {"pattern": "x{3}", "metrics": ["exact_match"]}}, "is in no answer of sums"),
        ({"model": {"head": "shared"}}, "a language model keeps its own head"),
        ({"data": {"max_length": 3}}, "no training example of sums can be used: 48 for the prompt fills the 3 tokens; the first: "),
        ({"method": {"name": "ce-lora"}}, "CE-LoRA needs classes, and causal language modelling has none"),
        ({"data": {"messages": "question"}}, "no list of messages"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        run(tmp_path, change)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base(bits: str, tmp_path: Path) -> None:
    """Its adapter has the run's scores on the quantised base, and is a change of the full one, into which it is merged."""
    quantise = {"model": {"quantise": bits}}
    summary = run(tmp_path, quantise, name="llama/wide")
    folder = tmp_path / "run"
    assert summary["result"] == "adapter" and summary["versions"]["bitsandbytes"]
    assert summary["final"]["answer_loss"] < read_rows(folder)[0]["answer_loss"]
    export(folder, tmp_path / "merged", None, merged=True)
    folders = {"quantised": folder / "adapter", "full": folder / "adapter", "merged": tmp_path / "merged"}
    found = {name: x for name, (x, _) in read(folders, tmp_path, quantise={"quantised": bits}).items()}
    tokens = sum(len(architectures.chat_tokenizer()(a)["input_ids"]) + 1 for _, a in pairs(12, 2))
    np.testing.assert_allclose(found["quantised"], own_losses(folder), rtol=1e-4)
    assert summary["final"]["answer_loss"] == pytest.approx(found["quantised"].sum() / tokens, rel=1e-4)
    np.testing.assert_allclose(found["full"], own_losses(folder, quantise=None), rtol=1e-4)
    np.testing.assert_allclose(found["merged"], found["full"], rtol=1e-4)
    assert np.abs(found["full"] / found["quantised"] - 1).max() > 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert f"| base in training | in {bits}, by bitsandbytes |" in (folder / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_on_a_quantised_base_goes_on(tmp_path: Path) -> None:
    quantise = {"model": {"quantise": "4bit"}}
    summary = run(tmp_path, quantise, out="whole", name="llama/wide")
    with pytest.raises(KeyboardInterrupt):
        execute(tables(tmp_path, quantise), tmp_path / "run", False, tiny.Silent(stop_after=1))
    again = execute(tables(tmp_path, quantise), tmp_path / "run", True, tiny.Silent())
    assert again["final"]["answer_loss"] == summary["final"]["answer_loss"]
    (said,) = predict(tmp_path / "run", ["3 and 4?"])
    assert said["tokens"] > 0


@pytest.mark.parametrize("method", ["fedavg", "slora", "fedhm", *MERGE])
def test_a_method_that_changes_a_base_that_cannot_be(method: str, tmp_path: Path) -> None:
    title = methods.find(method).FACTS.title
    with pytest.raises(BadInput) as error:
        run(tmp_path, {"method": {"name": method}, "model": {"quantise": "8bit"}}, name="llama")
    said = str(error.value)
    assert (
        said.startswith(f"{title} changes the base model's own weights, and those in 8bit cannot be changed") and "\n" not in said
    )
    assert all(name in said for name in ("fedit", "flexlora", "lora-a2", "fedsa-lora")) and method not in said.split(": ")[1].split(
        ", "
    )
    assert "ce-lora" not in said and not (tmp_path / "run").exists()


def save_packed(folder: Path) -> None:
    """A base in 8 bits."""
    base, tokenizer = architectures.causal("llama/wide")
    base.save_pretrained(folder / "full")
    how = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(folder / "full", quantization_config=how).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def test_a_checkpoint_that_is_quantised_and_a_method_that_changes_it(tmp_path: Path) -> None:
    save_packed(tmp_path)
    with pytest.raises(BadInput, match="FLoRA changes the base model's own weights, and those in 8bit cannot be changed"):
        run(tmp_path, {"method": {"name": "flora"}})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_on_a_checkpoint_that_is_quantised(tmp_path: Path) -> None:
    """Merged, it is in full precision, and its rounded weights are what they were."""
    save_packed(tmp_path)
    run(tmp_path, {"train": {"rounds": 1}})
    export(tmp_path / "run", tmp_path / "merged", None, merged=True)
    found = read({"adapter": tmp_path / "run" / "adapter", "merged": tmp_path / "merged"}, tmp_path)
    for losses, _ in found.values():
        np.testing.assert_allclose(losses, own_losses(tmp_path / "run"), rtol=1e-4)


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path, {"method": {"name": "lora-a2"}}, out="whole")
    with pytest.raises(KeyboardInterrupt):
        execute(tables(tmp_path, {"method": {"name": "lora-a2"}}), tmp_path / "run", False, tiny.Silent(stop_after=1))
    again = execute(tables(tmp_path, {"method": {"name": "lora-a2"}}), tmp_path / "run", True, tiny.Silent())
    assert again["final"]["answer_loss"] == whole["final"]["answer_loss"]


VERSIONS = ("0.18.1", "0.20.0", "0.21.2")  # of PEFT
FAST = ("flora", "feddpa", "fedavg")
REFUSED = {"ce-lora": "CE-LoRA needs classes, and causal language modelling has none"}


def left_by(method: str, place: Path) -> tuple[dict[str, Path], dict[str, np.ndarray]]:
    """A run of a method, with mixed ranks where they are allowed: what is exported of it, and the losses that `predict` works
    with, by name."""
    mixed = methods.find(method).FACTS.mixed_ranks
    config = {"method": {"name": method}, "clients": {"rank": [2, 3, 4] if mixed else 2}}
    if method in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[method]):
            run(place, config, out=method)
        return {}, {}
    summary = run(place, config, out=method, name="llama")
    rows = read_rows(place / method)
    assert [row["failed"] for row in rows] == [0, 0] and rows[0]["loss"] != rows[1]["loss"]
    assert summary["final"]["answer_loss"] > 0
    folders: dict[str, Path] = {}
    mine: dict[str, np.ndarray] = {}
    for client in (0, 1) if methods.find(method).FACTS.personal else (None,):
        for merged in (False, True):
            to = place / f"{method} {client} {merged}"
            try:
                export(place / method, to, client, merged)
            except BadInput as error:
                assert "for each input" in str(error) and method in ("fedlease", "feddpa")
                assert predict(place / method, ["3 and 4?"], client=client)[0]["tokens"] > 0
            else:
                folders[to.name], mine[to.name] = to, own_losses(place / method, client)
    return folders, mine


def compare(found: dict[str, tuple[np.ndarray, str]], mine: dict[str, np.ndarray]) -> None:
    assert found.keys() == mine.keys()
    for name, (losses, _) in found.items():
        np.testing.assert_allclose(losses, mine[name], rtol=1e-4, err_msg=name)


def test_the_base_is_what_a_run_is_held_against_also_after_a_stop(tmp_path: Path) -> None:
    """By plain transformers on the base; fedloru merges into the base that is trained on, which must not be taken for it."""
    import torch

    change = {"method": {"name": "fedloru"}}
    whole = run(tmp_path, change, out="whole")["final"]
    model, tokenizer = architectures.causal("llama/tied")
    total = count = 0
    for q, a in pairs(12, 2):
        start, ids = len(tokenizer(f"{q}\n")["input_ids"]), torch.tensor([*tokenizer(f"{q}\n{a}")["input_ids"], 3])
        with torch.no_grad():
            logs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids)))
        count += len(ids) - start
    assert whole["base_answer_loss"] == pytest.approx(total / count, rel=1e-5) and whole["answer_loss"] < whole["base_answer_loss"]
    with pytest.raises(KeyboardInterrupt):
        execute(tables(tmp_path, change), tmp_path / "run", False, tiny.Silent(stop_after=1))
    again = execute(tables(tmp_path, change), tmp_path / "run", True, tiny.Silent())
    assert again["final"] == whole
    assert len({row["base_answer_loss"] for row in (*read_rows(tmp_path / "whole"), *read_rows(tmp_path / "run"))}) == 1


@pytest.mark.parametrize("metric", ["exact_match", "rouge_l", "token_accuracy"])
def test_the_base_has_a_score_of_each_kind(metric: str, tmp_path: Path) -> None:
    """Of a run that learns nothing, it is the run's own."""
    final = run(tmp_path, {"task": {"metrics": [metric]}, "train": {"lr": 1e-12, "rounds": 1}})["final"]
    assert final[f"base_{metric}"] == final[metric]


@pytest.mark.slow
def test_methods_train_a_language_model_and_others_find_the_same_in_what_they_leave(tmp_path: Path) -> None:
    """A stack, what depends on the input, and full fine-tuning."""
    folders: dict[str, Path] = {}
    mine: dict[str, np.ndarray] = {}
    for method in FAST:
        more, losses = left_by(method, tmp_path)
        folders, mine = folders | more, mine | losses
    compare(read(folders, tmp_path), mine)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, np.ndarray]]:
    """What every method leaves, on a Llama; and FedIT on one with a tied head, and on GPT-2, whose weights lie the other way."""
    folders: dict[str, Path] = {}
    mine: dict[str, np.ndarray] = {}
    place = tmp_path_factory.mktemp("methods")
    for method in methods.names():
        more, losses = left_by(method, place)
        folders, mine = folders | more, mine | losses
    for name in ("llama/tied", "gpt2"):
        for method in ("fedit", "fedavg"):
            own = tmp_path_factory.mktemp("others")
            kind = run(own, {"method": {"name": method}}, name=name)["result"]
            folders[f"{method} of {name}"], mine[f"{method} of {name}"] = own / "run" / kind, own_losses(own / "run")
    return folders, mine


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_what_every_method_leaves_is_the_same_under_each_peft(version: str, everything: Any, tmp_path: Path) -> None:
    folders, mine = everything
    assert {name.split(" ")[0] for name in folders} == set(methods.names()) - set(REFUSED) - {"fedlease", "feddpa"}
    compare(read(folders, tmp_path, version), mine)
