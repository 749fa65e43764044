"""Vision models: drawn from the seed or loaded, tried by what they do, and trained as PEFT and torch train them."""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pictures
import pytest
import tiny
import torch
import transformers

from fedlora import seeds
from fedlora.config import ModelConfig, TrainConfig
from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.models import vision
from fedlora.models.load import Pretrained
from fedlora.models.packing import Shared
from fedlora.models.peft import rehearse
from fedlora.models.slots import find_targets
from fedlora.tasks.image_classification import ImageClassification
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job, batches
from fedlora.types import FULL, ClassMixtures, Factors, Features, Observe, Train

LABELS = ("a", "b", "c")
SETTINGS = TrainConfig(batch_size=8, lr=5e-3, epochs=2)
AB = frozenset({("shared", "A"), ("shared", "B")})


def load(source: str | Path, shape: tuple[int, ...] = (3, 8, 8), seed: int = 5, size: int | None = None) -> Pretrained:
    return vision.load(ModelConfig(source=str(source)), LABELS, shape, seed, size)


def trainer(pretrained: Pretrained, settings: TrainConfig = SETTINGS, dtype: torch.dtype = torch.float32) -> Trainer:
    targets = find_targets(pretrained.model, "all-linear")
    found = vision.try_model(pretrained.model, targets, vision.shape_of(pretrained))
    return Trainer(pretrained, found.targets, settings, torch.device("cpu"), dtype, tiny.objective(), form=found.form)


def images(count: int, shape: tuple[int, ...], rows: int) -> Encoded:
    rng = np.random.default_rng(3)
    x = tuple(rng.standard_normal((count, *shape)).astype(np.float32))
    return Encoded(x, np.arange(count) % 3, np.full(count, rows))


def adapter(pretrained: Pretrained, rank: int = 4) -> Factors:
    g = torch.Generator().manual_seed(3)
    layers = {m: pretrained.model.get_submodule(m) for m in find_targets(pretrained.model, "all-linear")}
    A = {m: torch.randn(rank, x.in_features, generator=g) / x.in_features**0.5 for m, x in layers.items()}
    return Factors(A, {m: torch.randn(x.out_features, rank, generator=g) * 0.1 for m, x in layers.items()}, 2.0)


# ---- drawn from the seed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "vit-tiny"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 6)])
def test_a_model_from_scratch_is_drawn_by_name_and_shaped_by_the_data(name: str, shape: tuple[int, ...]) -> None:
    model, again, other = (load(name, shape, seed).model for seed in (5, 5, 6))
    for path, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(path)) and torch.equal(p, other.get_parameter(path)) == (p.ndim < 2)
    path, weight = next((path, p) for path, p in model.named_parameters() if path.endswith("weight") and p.ndim == 2)
    wanted = seeds.generator(5, "from scratch", path).normal(0, weight.shape[1] ** -0.5, weight.shape)
    np.testing.assert_array_equal(weight.numpy(), wanted.astype(np.float32))
    assert model(torch.zeros(2, *shape)).logits.shape == (2, 3) and model.config.id2label == dict(enumerate(LABELS))
    outline = vision.outline(ModelConfig(source=name), LABELS, shape).model
    assert outline.get_parameter(path).device == torch.device("meta")
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in outline.named_parameters()]


@pytest.mark.parametrize(
    ("source", "shape", "said"),
    [
        ("mlp", (), r"model\.source = 'mlp': it takes the size of the images, and these differ; task\.size = 32 stretches them"),
        ("minilm", (1, 8, 8), r"this is a model of texts; mlp, vit-tiny, a local folder or a Hub id of images is needed"),
        ("vit", (1, 8, 8), r"unknown model 'vit'; possible: mlp, vit-tiny; a local folder or a Hub id"),
        ("./gone", (1, 8, 8), r"no such folder"),
    ],
)
def test_what_is_no_model_of_images_is_refused(source: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        load(source, shape)


def test_a_folder_of_a_text_model_is_refused(bert_folder: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.source = ") as error:
        load(bert_folder)
    assert "\n" not in str(error.value)


def test_a_perceptron_is_saved_and_read_by_transformers(tmp_path: Path) -> None:
    pretrained = load("mlp", (3, 4, 5))
    pretrained.model.save_pretrained(tmp_path)
    read = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(4, 3, 4, 5)
    hidden = x.flatten(1)
    for layer in pretrained.model.mlp.layers:
        hidden = (hidden @ layer.weight.mT + layer.bias).clamp(min=0)
    wanted = hidden @ pretrained.model.classifier.weight.mT + pretrained.model.classifier.bias
    torch.testing.assert_close(read(pixel_values=x).logits, wanted)
    assert read.config.id2label == dict(enumerate(LABELS))


# ---- loaded ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_keeps_its_body_and_gets_a_head_from_the_seed(tmp_path: Path) -> None:
    pretrained = load(pictures.save_vit(tmp_path / "vit", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]), (1, 28, 28))
    body = transformers.AutoModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    for name, p in body.named_parameters():
        torch.testing.assert_close(pretrained.model.vit.get_parameter(name), p, rtol=0, atol=0)
    assert pretrained.head == ("classifier.weight", "classifier.bias") and pretrained.source == str((tmp_path / "vit").resolve())
    assert vision.shape_of(pretrained) == (3, 8, 8) and list(pretrained.processor.image_mean) == [0.1, 0.2, 0.3]
    again, other = load(tmp_path / "vit").model.classifier.weight, load(tmp_path / "vit", seed=6).model.classifier.weight
    assert torch.equal(again, pretrained.model.classifier.weight) and not torch.equal(again, other)


def test_a_size_that_a_model_cannot_take_is_refused_before_round_1(tmp_path: Path) -> None:
    pretrained = load(pictures.save_vit(tmp_path / "vit"), size=12)
    with pytest.raises(BadInput, match="ViTForImageClassification does not take an image of 3 x 12 x 12"):
        vision.try_model(pretrained.model, ["vit.layers.0.attention.q_proj"], vision.shape_of(pretrained))


# ---- how they are run --------------------------------------------------------------------------------------------------


def swin() -> Any:
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "window_size": 4, "depths": [1, 1]}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_heads=[2, 2], num_labels=3))


def resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)


def test_the_trial_finds_rows_heads_and_who_may_share_a_pass() -> None:
    for model, shape, rows, apart in (
        (load("mlp").model, (3, 8, 8), 1, False),
        (load("vit-tiny").model, (3, 8, 8), 17, False),
        (swin().eval(), (3, 16, 16), 16, True),  # 64 rows in the first stage
    ):
        found = vision.try_model(model, find_targets(model, "all-linear"), shape)
        assert (found.form.shared, found.form.rows, found.limit, found.form.apart) == (Shared.STACKED, rows, rows, apart)
        assert found.form.split is not apart and found.form.shape == shape and bool(found.notes) is apart
    with pytest.raises(BadInput, match=r"target_modules"):
        find_targets(resnet(), "all-linear")


@pytest.mark.parametrize("kind", ["mlp", "vit-tiny", "swin"])
def test_peft_holds_an_adapter_on_them(kind: str, tmp_path: Path) -> None:
    shape = (3, 16, 16)
    pretrained = Pretrained(swin().eval(), None, "", peft_task=None) if kind == "swin" else load(kind, shape)
    found = vision.try_model(pretrained.model, find_targets(pretrained.model, "all-linear"), shape)
    rehearse(pretrained, found.targets, found.form)


@pytest.mark.parametrize("kind", ["mlp", "vit-tiny", "swin", "resnet"])
def test_features_are_the_mean_over_the_places_of_the_last_hidden_state(kind: str) -> None:
    shape = (3, 16, 16)
    model = {"swin": swin, "resnet": resnet}.get(kind, lambda: load(kind, shape).model)().eval()
    targets = [] if kind == "resnet" else find_targets(model, "all-linear")
    found = vision.try_model(model, targets, shape)
    pretrained = Pretrained(model.requires_grad_(False), None, "", peft_task=None)
    own = Trainer(pretrained, found.targets, SETTINGS, torch.device("cpu"), torch.float32, tiny.objective(), form=found.form)
    data = images(7, shape, found.limit)
    with torch.no_grad():
        hidden = model.base_model(torch.from_numpy(np.stack(data.inputs)))[0]
    wanted = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)
    for pool in ("mean", "first"):  # no image begins with a token that stands for it in every model
        torch.testing.assert_close(own.features(data, pool), wanted, atol=1e-5, rtol=1e-4)
    seen = own.observe(Observe(ClassMixtures(2), pool="first"), data, 1).tensors
    assert seen["counts"].tolist() == [3, 2, 2] and seen["means"].shape[2] == wanted.shape[1]
    assert own.features(data.take(np.zeros(0, dtype=np.int64))).shape == (0, wanted.shape[1])
    torch.testing.assert_close(own.observe(Observe(Features(99)), data, 1).tensors["features"], wanted, atol=1e-5, rtol=1e-4)


# ---- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_training_equals_peft(kind: str, tmp_path: Path) -> None:
    source = "mlp" if kind == "mlp" else pictures.save_vit(tmp_path / "vit")
    pretrained, plain = load(source), load(source).model
    start, data = adapter(pretrained), images(21, (3, 8, 8), 1 if kind == "mlp" else 5)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(start.A))
    wrapped = peft.get_peft_model(plain, config).eval()
    layers = {m: wrapped.base_model.model.get_submodule(m) for m in start.A}
    for m, layer in layers.items():
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = start.A[m].clone(), start.B[m].clone()
    optimizer = torch.optim.AdamW([p for n, p in wrapped.named_parameters() if "lora_" in n], lr=5e-3, weight_decay=0.01)
    total = 0.0
    for where in batches(Job(Train({}, frozenset(), epochs=2), data, 7, {}), SETTINGS):
        x, y = torch.from_numpy(np.stack([data.inputs[i] for i in where])), torch.from_numpy(data.targets[where])
        loss = torch.nn.functional.cross_entropy(wrapped(pixel_values=x).logits, y)
        total += loss.item() * len(y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    outcome = tiny.train_one(trainer(pretrained), Job(Train({"shared": start}, AB), data, 7, {}))
    for m, layer in layers.items():
        done = outcome.trained.slots["shared"]
        torch.testing.assert_close(done.A[m], layer.lora_A["default"].weight.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(done.B[m], layer.lora_B["default"].weight.detach(), atol=1e-4, rtol=1e-4)
    assert outcome.trained.loss == pytest.approx(total / 42, abs=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_full_fine_tuning_and_head_equal_plain_torch(kind: str, tmp_path: Path) -> None:
    source = "mlp" if kind == "mlp" else pictures.save_vit(tmp_path / "vit")
    pretrained, plain = load(source), load(source).model.requires_grad_(True)
    settings = TrainConfig(batch_size=8, lr=0.05, epochs=2, optimizer="sgd", weight_decay=0.1)
    data, own = images(21, (3, 8, 8), 1 if kind == "mlp" else 5), trainer(pretrained, settings)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, weight_decay=0.1)
    for where in batches(Job(Train({}, frozenset(), epochs=2), data, 7, {}), settings):
        x, y = torch.from_numpy(np.stack([data.inputs[i] for i in where])), torch.from_numpy(data.targets[where])
        torch.nn.functional.cross_entropy(plain(x).logits, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    outcome = tiny.train_one(own, Job(Train({}, FULL), data, 7, own.head))
    assert set(outcome.trained.full) | set(outcome.head) == set(before)
    for name, delta in outcome.trained.full.items():
        torch.testing.assert_close(before[name] + delta, plain.get_parameter(name).detach(), atol=1e-5, rtol=1e-4)
    for name, p in outcome.head.items():
        torch.testing.assert_close(p, plain.get_parameter(name).detach(), atol=1e-5, rtol=1e-4)


def test_clients_of_a_model_whose_layers_see_other_rows_do_not_share_a_pass() -> None:
    """A Swin in float64: two clients together learn what each learns alone."""
    pretrained = Pretrained(swin().eval().requires_grad_(False), None, "", peft_task=None)
    own = trainer_of_swin(pretrained)
    start = adapter(pretrained, 2)
    start = replace(start, A={m: x.double() for m, x in start.A.items()}, B={m: x.double() for m, x in start.B.items()})
    data = images(12, (3, 16, 16), own.forward.form.rows)
    jobs = [Job(Train({"shared": start}, AB), data.take(np.arange(12)[i::2]), i, {}) for i in range(2)]
    alone = [tiny.train_one(own, job) for job in jobs]
    own.rows = 10**6
    both = dict(own.train(deque(jobs)))
    for job, one in zip(jobs, alone, strict=True):
        for m in start.A:
            torch.testing.assert_close(
                both[job].trained.slots["shared"].B[m], one.trained.slots["shared"].B[m], atol=1e-9, rtol=1e-9
            )


def trainer_of_swin(pretrained: Pretrained) -> Trainer:
    targets = find_targets(pretrained.model, "all-linear")
    found = vision.try_model(pretrained.model, targets, (3, 16, 16))
    return Trainer(pretrained, found.targets, SETTINGS, torch.device("cpu"), torch.float64, tiny.objective(), form=found.form)


def test_a_task_loads_encodes_and_outlines_by_its_schema() -> None:
    task, schema = ImageClassification(), Schema(LABELS, shape=(1, 8, 8))
    assert task.outline(ModelConfig(source="mlp"), schema).model.classifier.weight.device == torch.device("meta")
    assert vision.shape_of(task.load(ModelConfig(source="mlp"), schema, 0)) == (1, 8, 8)
