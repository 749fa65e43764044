"""Statistics of a client's data, and gates, on a tiny model against transformers alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers

from fedlora.config import ModelConfig, TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models.load import from_config
from fedlora.models.packing import Form, Inputs
from fedlora.models.slots import find_targets
from fedlora.tasks.texts import encode
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job
from fedlora.training.observe import first_of_each, observe, similarity_weights
from fedlora.types import BaseUpdate, ClassMixtures, Factors, Features, Mix, Model, Observe, Similarity, Train

SETTINGS = TrainConfig(batch_size=8, lr=5e-3, epochs=1)


@pytest.fixture
def trainer(bert_folder: Path) -> Trainer:
    pretrained = tiny.load_model(ModelConfig(source=str(bert_folder)), tiny.CLASSES, seed=5)
    return Trainer(
        pretrained, find_targets(pretrained.model, "all-linear"), SETTINGS, torch.device("cpu"), torch.float32, tiny.objective()
    )


def some_data(tokenizer, domains=()) -> Encoded:
    texts, labels = tiny.examples(21, 4)
    got = encode(tokenizer, texts, np.array([tiny.CLASSES.index(x) for x in labels]), 64)
    return replace(got, domains=np.array(domains, dtype=np.int64))


@pytest.fixture
def data() -> Encoded:
    return some_data(tiny.tokenizer())


def slot(trainer: Trainer, seed: int) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(2, i, generator=g) / i**0.5 for m, (_, i) in trainer.shapes.items()}
    return Factors(A, {m: torch.randn(o, 2, generator=g) * 0.2 for m, (o, _) in trainer.shapes.items()}, 2.0)


def plain_features(folder: Path, data: Encoded) -> np.ndarray:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = [model(torch.tensor(ids.astype(np.int64))[None]).last_hidden_state[0].mean(dim=0) for ids in data.inputs]
    return torch.stack(rows).detach().numpy()


def test_features_are_those_of_the_pretrained_model_whatever_was_merged(bert_folder, trainer, data):
    expected = plain_features(bert_folder, data)
    np.testing.assert_allclose(trainer.features(data), expected, atol=1e-5)
    trainer.fold(BaseUpdate(0, 1, (slot(trainer, 1),)))
    merged = {n: p.clone() for n, p in trainer.base.parameters.items()}
    np.testing.assert_allclose(trainer.features(data), expected, atol=1e-5)
    assert trainer.version == 1 and all(torch.equal(p, merged[n]) for n, p in trainer.base.parameters.items())


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "gpt2", "llama"])
def test_every_kind_of_model_has_features(kind):
    pretrained = from_config(tiny.config(kind), tiny.tokenizer(), 1)
    trainer = Trainer(
        pretrained, find_targets(pretrained.model, "all-linear"), SETTINGS, torch.device("cpu"), torch.float32, tiny.objective()
    )
    data = some_data(tiny.tokenizer())
    one_by_one = torch.cat([trainer.features(data.take(np.array([i]))) for i in range(len(data))])
    torch.testing.assert_close(trainer.features(data), one_by_one, atol=1e-5, rtol=1e-4)


def trainer_of(kind: str, tokenizer, form: Form | None = None) -> Trainer:
    pretrained = from_config(tiny.config(kind), tokenizer, 1)
    targets = find_targets(pretrained.model, "all-linear")
    return Trainer(pretrained, targets, SETTINGS, torch.device("cpu"), torch.float32, tiny.objective(), form=form)


@pytest.mark.parametrize("form", [None, Form()], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_the_first_token_of_an_encoder_is_the_one_that_transformers_has(kind, form):
    trainer, data = trainer_of(kind, tiny.tokenizer(), form), some_data(tiny.tokenizer())
    plain = from_config(tiny.config(kind), tiny.tokenizer(), 1).model.base_model
    expected = [plain(torch.tensor(ids.astype(np.int64))[None]).last_hidden_state[0, 0] for ids in data.inputs]
    got = trainer.features(data, "first")
    np.testing.assert_allclose(got, torch.stack(expected).detach(), atol=1e-5)
    assert trainer.scorer.has_first and float((got - trainer.features(data)).abs().max()) > 0.1
    seen = trainer.observe(Observe(Features(99), pool="first"), data, 1).tensors["features"]
    torch.testing.assert_close(seen, got, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_has_no_first_token_that_stands_for_the_text(kind):
    """Here its tokenizer even begins with [CLS]: but that token sees nothing of the text."""
    trainer, data = trainer_of(kind, tiny.tokenizer()), some_data(tiny.tokenizer())
    assert not trainer.scorer.has_first
    assert torch.equal(trainer.features(data, "first"), trainer.features(data))


def test_an_encoder_whose_texts_begin_otherwise_has_none_either():
    tokenizer = tiny.tokenizer()
    tokenizer.cls_token = "[SEP]"  # another than the first one
    trainer, data = trainer_of("bert", tokenizer), some_data(tiny.tokenizer())
    assert torch.equal(trainer.features(data, "first"), trainer.features(data))


def test_the_first_token_is_found_behind_padding():
    hidden = torch.arange(2 * 4 * 3.0).view(8, 3)
    texts = Inputs(torch.zeros(2, 4), np.array([4, 4]), mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert torch.equal(first_of_each(hidden, texts), hidden[[2, 4]])


def test_drawn_features_belong_to_the_data_and_the_seed(trainer, data):
    all_of_them = trainer.features(data)
    ask = Observe(Features(5))
    drawn = [trainer.observe(ask, data, seed).tensors["features"] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    nearest = torch.cdist(drawn[0], all_of_them).min(dim=1)
    assert drawn[0].shape == (5, 16) and nearest.values.max() < 1e-5 and len(set(nearest.indices.tolist())) == 5
    assert len(trainer.observe(Observe(Features(99)), data, 1).tensors["features"]) == len(data)


def test_a_domain_is_observed_alone(bert_folder):
    pretrained = tiny.load_model(ModelConfig(source=str(bert_folder)), tiny.CLASSES, seed=5)
    targets = find_targets(pretrained.model, "all-linear")
    domains = {"x": range(1), "y": range(1, 3)}
    trainer = Trainer(pretrained, targets, SETTINGS, torch.device("cpu"), torch.float32, tiny.objective(**(domains or {})))
    data = some_data(tiny.tokenizer(), domains=[0] * 4 + [1] * 17)
    assert len(trainer.observe(Observe(Features(99), "x"), data, 1).tensors["features"]) == 4
    assert len(trainer.observe(Observe(Features(99)), data, 1).tensors["features"]) == 21


def test_mixtures_find_separated_parts():
    """Class 4: two far blobs of 30 and 10; class 7: two examples; class 9: one, which does not count."""
    rng = np.random.default_rng(0)
    blob = [rng.normal(5, 0.5, (30, 3)), rng.normal(-5, 0.1, (10, 3))]
    x = np.concatenate([*blob, [[1.0, 2, 3], [3, 2, 1]], [[9, 9, 9]]]).astype(np.float32)
    labels = np.array([4] * 40 + [7] * 2 + [9])
    order = rng.permutation(len(x))
    x, labels = x[order], labels[order]
    got = observe(ClassMixtures(3), labels, lambda where: torch.from_numpy(x[where]), 1)
    assert got["labels"].tolist() == [4, 7] and got["counts"].tolist() == [40, 2]
    assert got["weights"].sum(dim=1).tolist() == pytest.approx([1, 1])
    assert got["weights"][1, 2] == 0 and not got["means"][1, 2].any()
    np.testing.assert_allclose(sorted(got["means"][1, :2].tolist()), [[1, 2, 3], [3, 2, 1]], atol=1e-6)
    low = got["means"][0, :, 0] < 0
    assert float(got["weights"][0][low].sum()) == pytest.approx(0.25, abs=1e-3)
    np.testing.assert_allclose((got["weights"][0] @ got["means"][0]), np.concatenate(blob).mean(axis=0), atol=1e-3)
    one = observe(ClassMixtures(1), labels, lambda where: torch.from_numpy(x[where]), 1)
    np.testing.assert_allclose(one["variances"][0, 0], np.concatenate(blob).var(axis=0) + 1e-5, rtol=1e-4)
    assert {name: tuple(t.shape) for name, t in got.items() if t.ndim == 3} == {"means": (2, 3, 3), "variances": (2, 3, 3)}


def test_no_class_of_two_examples_gives_empty_mixtures():
    got = observe(ClassMixtures(3), np.array([1, 2]), lambda where: torch.ones(len(where), 4), 1)
    assert {name: tuple(t.shape) for name, t in got.items()} == {
        "labels": (0,),
        "counts": (0,),
        "weights": (0, 3),
        "means": (0, 3, 4),
        "variances": (0, 3, 4),
    }


def test_mixed_slots_train_as_rescaled_ones_do(trainer, data):
    """Whatever a weight does, a scale does: two slots at weights w equal the same two at scale w s."""
    one, two = slot(trainer, 1), slot(trainer, 2)
    ask = Train({"one": one, "two": two}, frozenset({("one", "A"), ("one", "B")}), gate=Mix({"one": 0.25}))
    by_gate, by_scale = (
        tiny.train_one(trainer, Job(each, data, 7, {})).trained
        for each in (ask, Train({"one": Factors(one.A, one.B, 0.5), "two": two}, ask.roles))
    )
    assert by_gate.loss == pytest.approx(by_scale.loss, abs=1e-6) and by_gate.gate == ask.gate
    for m in one.A:
        torch.testing.assert_close(by_gate.slots["one"].B[m], by_scale.slots["one"].B[m], atol=1e-5, rtol=1e-4)
        assert torch.equal(by_gate.slots["two"].B[m], two.B[m]) and not torch.equal(by_gate.slots["one"].B[m], one.B[m])


def test_a_similarity_gate_weighs_every_input_by_its_own_features(bert_folder, trainer, data):
    slots = {"shared": slot(trainer, 1), "local": slot(trainer, 2)}
    x = plain_features(bert_folder, data)
    anchors = torch.from_numpy(np.concatenate([x[:2], -0.4 * x[2:3]]))
    weights = []
    for row in x:
        cosines = [float(row @ a / np.linalg.norm(row) / np.linalg.norm(a)) for a in anchors.numpy()]
        weights.append(0.3 * np.mean(cosines))
    assert 0.05 < min(weights) < max(weights) < 0.3  # none at the cap
    np.testing.assert_allclose(similarity_weights(torch.from_numpy(x), anchors, 0.3), weights, atol=1e-5)
    np.testing.assert_allclose(similarity_weights(torch.from_numpy(-x), anchors, 0.3), -np.array(weights), atol=1e-5)
    got = tiny.logits(trainer, Model(slots, gate=Similarity("local", anchors, 0.3)), {}, data)
    plain = tiny.logits(trainer, Model(slots), {}, data)
    for i, a in enumerate(weights):
        mixed = Model(slots, gate=Mix({"local": a, "shared": 1 - a}))
        np.testing.assert_allclose(got[i], tiny.logits(trainer, mixed, {}, data.take(np.array([i])))[0], atol=1e-4)
        assert np.abs(got[i] - plain[i]).max() > 1e-2
    assert not trainer.base.adapted.bound
