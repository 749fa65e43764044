"""Whole runs on images: what is exported gives the run's score under plain transformers; every method plays two rounds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pictures
import pytest
import tiny
import torch
import transformers
from PIL import Image

from fedlora import methods
from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.runs.export import export
from fedlora.runs.play import execute
from fedlora.runs.predict import predict
from fedlora.summary import read_rows

SLOW = pytest.mark.slow


def run(folder: Path, *layers: dict[str, Any], out: str = "run") -> dict[str, Any]:
    common = {
        "precision": "fp32",
        "task": {"name": "image_classification"},
        "method": {"name": "fedit"},
        "model": {"source": "mlp", "head": "shared"},
        "data": {"source": str(folder / "shades"), "alpha": 9.0},
        "clients": {"count": 3, "rank": 2},
        "train": {"rounds": 2, "lr": 0.02, "batch_size": 8, "epochs": 2},
    }
    if not (folder / "shades").exists():
        pictures.save_folder(folder / "shades", channels=3)
    return execute(resolve(common, *layers), folder / out, False, tiny.Silent())


def score(model: Any, folder: Path, processed: Path, mode: str = "RGB") -> tuple[float, np.ndarray]:
    """Accuracy on the test images, and their probabilities, by plain transformers."""
    processor, names, right, found = transformers.AutoImageProcessor.from_pretrained(processed), model.config.id2label, 0, []
    for file in sorted((folder / "shades" / "test").rglob("*.png")):
        with torch.no_grad():
            p = model(**processor(Image.open(file).convert(mode), return_tensors="pt")).logits.softmax(-1)[0].numpy()
        found.append(p)
        right += names[int(p.argmax())] == file.parent.name
    return right / len(found), np.array(found)


def test_a_model_of_the_hub_gives_its_score_as_an_adapter_and_merged(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """12 pixels a side stretched to the model's 8; a checkpoint whose head has other classes."""
    pictures.save_folder(tmp_path / "shades", size=12, channels=3)
    torch.manual_seed(0)
    other = pictures.vit()
    other.num_labels = 7
    transformers.ViTForImageClassification(other).save_pretrained(tmp_path / "base")
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.3] * 3).save_pretrained(tmp_path / "base")
    summary = run(tmp_path, {"model": {"source": str(tmp_path / "base")}})
    assert summary["result"] == "adapter" and summary["model"]["clients"] == "together" and summary["final"]["accuracy"] > 0.6
    kind, folder = transformers.AutoModelForImageClassification, tmp_path / "run" / "adapter"
    names = dict(enumerate(("dark", "left", "light")))
    base = kind.from_pretrained(tmp_path / "base", id2label=names, ignore_mismatched_sizes=True)
    found, adapted = score(peft.PeftModel.from_pretrained(base, folder).eval(), tmp_path, folder)
    export(tmp_path / "run", tmp_path / "merged", None, merged=True)
    again, merged = score(kind.from_pretrained(tmp_path / "merged").eval(), tmp_path, tmp_path / "merged")
    assert found == again == pytest.approx(summary["final"]["accuracy"])
    np.testing.assert_allclose(adapted, merged, atol=1e-5)
    files = sorted(str(file) for file in (tmp_path / "shades" / "test").rglob("*.png"))
    said = predict(tmp_path / "run", files)
    np.testing.assert_allclose([x["probability"] for x in said], merged.max(1), atol=1e-5)
    for place in (folder, tmp_path / "merged"):  # the code of the card, as it stands there
        monkeypatch.chdir(place)
        Image.open(files[0]).save("an image.png")
        capsys.readouterr()
        exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], {})
        assert capsys.readouterr().out.splitlines()[-1] == repr([said[0]["label"]])


@pytest.mark.parametrize("source", ["mlp", "vit-tiny"])
def test_a_model_from_scratch_is_exported_whole_for_nobody_has_its_base(source: str, tmp_path: Path, monkeypatch: Any) -> None:
    summary = run(tmp_path, {"model": {"source": source}, "method": {"name": "fedloru", "period": 1}})
    assert summary["result"] == "model" and not (tmp_path / "run" / "adapter").exists()
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model").eval()
    found, p = score(model, tmp_path, tmp_path / "run" / "model")
    assert found == pytest.approx(summary["final"]["accuracy"])
    files = sorted(str(file) for file in (tmp_path / "shades" / "test").rglob("*.png"))
    np.testing.assert_allclose([x["probability"] for x in predict(tmp_path / "run", files)], p.max(1), atol=1e-5)
    export(tmp_path / "run", tmp_path / "again", None, merged=False)
    one, other = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("again", "run/model"))
    assert one == other
    assert ("import fedlora.models.mlp" in (tmp_path / "again" / "README.md").read_text()) == (source == "mlp")


def test_turned_images_are_trained_on_and_scored(tmp_path: Path) -> None:
    """The model that is exported, on the test images turned as their clients see them, has the run's score."""
    turns = {"task": {"rotations": [0.0, 90.0, 180.0]}, "clients": {"held_out": 1, "count": 4}}
    summary = run(tmp_path, turns)
    straight = run(tmp_path, {"clients": {"held_out": 1, "count": 4}}, out="straight")
    assert summary["final"]["loss"] != straight["final"]["loss"]
    from fedlora.data.domains import deal
    from fedlora.data.load import load
    from fedlora.tasks.image_classification import ImageClassification

    config = resolve({"data": {"source": str(tmp_path / "shades"), "alpha": 9.0}, "clients": turns["clients"]})
    data = load(ImageClassification(), config.data, 0)
    parts = deal(data, config.data, config.clients, 0)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "run" / "model")
    from fedlora.data.images import opened

    right = held = 0
    for k, rows in enumerate(parts.test):
        for row in rows:
            x = np.rot90(np.asarray(opened(data.test.inputs[row])), k % 3)
            logits = model(**processor(np.ascontiguousarray(x), return_tensors="pt")).logits
            hit = int(logits.argmax()) == data.test.targets[row]
            right, held = right + hit, held + (hit and k == 3)
    assert summary["final"]["accuracy"] == pytest.approx(right / len(data.test))
    assert summary["held_out"]["accuracy"] == pytest.approx(held / len(parts.test[3]))


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    turns = {"task": {"rotations": [0.0, 15.0]}, "method": {"name": "ce-lora"}}
    whole = run(tmp_path, turns, out="whole")
    with pytest.raises(KeyboardInterrupt):
        config = resolve_of(tmp_path / "whole")
        execute(config, tmp_path / "run", False, tiny.Silent(stop_after=1))
    again = execute(config, tmp_path / "run", True, tiny.Silent())
    assert again["final"]["accuracy"] == whole["final"]["accuracy"]
    assert read_rows(tmp_path / "run")[-1]["loss"] == read_rows(tmp_path / "whole")[-1]["loss"]


def resolve_of(folder: Path) -> Any:
    from fedlora.config import read_run

    return read_run(folder)


def test_the_command_line_from_the_table_to_the_answer(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    call = tiny.console(monkeypatch, capsys, tmp_path)
    status, out, err = call("data", "digits", "--task", "image_classification", "--clients", 4, "--alpha", 0.3)
    assert status == 0 and "digits: 1,438 training and 359 test examples of 10 classes, Dirichlet(0.3), 4 clients" in out, err
    pictures.save_folder(tmp_path / "shades")
    flags = ("--task", "image_classification", "--method", "fedit", "--model", "mlp", "--data", "shades", "--clients", 2)
    status, out, err = call("run", *flags, "--rounds", 1, "--rank", 2, "--out", "run")
    assert status == 0 and "accuracy" in out and "result in run/model" in out, err
    status, out, err = call("run", *flags, "--dry-run", "--rank", 2)
    assert status == 0 and "training and 15 test images of 3 classes" in out, err
    file = next((tmp_path / "shades" / "test" / "light").iterdir())
    status, out, err = call("predict", "run", file)
    assert status == 0 and out.split("\t")[2] == f"{file}\n" and out.split("\t")[0] in pictures.CLASSES, err
    status, out, err = call("predict", "run", "--format", "csv", stdin=f"{file}\n")
    assert status == 0 and out.splitlines()[0] == "image,label,probability,p(dark),p(left),p(light)", err
    status, out, err = call("predict", "run", "--input", "shades/test")
    assert status == 0 and len(out.splitlines()) == 15, err
    (tmp_path / "bad.png").write_text("no image")
    status, out, err = call("predict", "run", "bad.png")
    assert status == 2 and err.splitlines() == ["error: bad.png: cannot be read as an image: it is of no known format"]
    status, out, err = call("predict", "run", "gone.png")
    assert status == 2 and err.splitlines() == ["error: gone.png: no such file"]
    status, out, err = call("run", *flags, "--set", "task.sise=3", "--rank", 2, "--out", "other")
    assert status == 2 and "task.size" in err


def test_clients_with_heads_of_their_own_are_scored_by_what_is_exported(tmp_path: Path) -> None:
    summary = run(tmp_path, {"model": {"head": "personal"}, "data": {"strata": "cluster"}})
    export(tmp_path / "run", tmp_path / "one", 1, merged=False)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "one").eval()
    files = sorted(str(file) for file in (tmp_path / "shades" / "test").rglob("*.png"))
    _, p = score(model, tmp_path, tmp_path / "one")
    np.testing.assert_allclose([x["probability"] for x in predict(tmp_path / "run", files, client=1)], p.max(1), atol=1e-5)
    assert set(summary["clients"]) and read_rows(tmp_path / "run")[-1]["clients_scored"] == 3


def test_images_that_are_all_alike_are_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "shades" / part / label).mkdir(parents=True)
            for i in range(4):
                (tmp_path / "shades" / part / label / f"{i}.png").write_bytes(pictures.png(np.zeros((8, 8), dtype=np.uint8)))
    with pytest.raises(BadInput, match="the first training images are all alike"):
        run(tmp_path)


# ---- every method, both tasks ------------------------------------------------------------------------------------------

REFUSED = {("text_regression", "ce-lora"): "CE-LoRA needs classes, and text regression has none"}
QUICK = {"ce-lora", "fedavg", "fedhm", "fedloru", "lora-a2"}


def each_method(task: str, *models: str) -> list[Any]:
    quick = QUICK if task == "image_classification" else {"ce-lora", "fedlease"}
    fast = {(models[0], method) for method in quick}
    each = [(model, method) for model in models for method in methods.names()]
    return [pytest.param(*one, marks=() if one in fast else SLOW, id="-".join(one)) for one in each]


@pytest.mark.parametrize(("model", "method"), each_method("image_classification", "mlp", "vit-tiny"))
def test_every_method_classifies_digits_for_two_rounds(model: str, method: str, tmp_path: Path) -> None:
    config = {
        "data": {"source": "digits", "limit": 90, "test_limit": 30, "alpha": 0.5},
        "model": {"source": model, "head": "frozen"},
        "method": {"name": method},
    }
    check(run(tmp_path, config), tmp_path / "run")


@pytest.mark.parametrize(("model", "method"), each_method("text_regression", "bert"))
def test_every_method_gives_numbers_for_two_rounds_or_is_refused(model: str, method: str, tmp_path: Path) -> None:
    tiny.save_model(model, tmp_path / "base")
    rows = [f'"{text}",{i % 7}' for i, text in enumerate(tiny.examples(60, 1)[0])]
    (tmp_path / "stars.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    config = {
        "task": {"name": "text_regression"},
        "data": {"source": str(tmp_path / "stars.csv"), "alpha": 0.5},
        "model": {"source": str(tmp_path / "base"), "head": "frozen"},
        "method": {"name": method},
    }
    if ("text_regression", method) in REFUSED:
        with pytest.raises(BadInput, match=REFUSED["text_regression", method]):
            run(tmp_path, config)
        assert not (tmp_path / "run").exists()
    else:
        check(run(tmp_path, config), tmp_path / "run")


def check(summary: dict[str, Any], folder: Path) -> None:
    """Two rounds, nobody failed, and something was learned: numbers that are finite, of a model that moved."""
    rows = read_rows(folder)
    assert [row["failed"] for row in rows] == [0, 0] and summary["rounds"] == 2
    final = json.loads((folder / "summary.json").read_text())["final"]
    assert final["score"] is not None and final["loss"] is not None and "undecided" not in final
    assert rows[0]["loss"] != rows[1]["loss"]
