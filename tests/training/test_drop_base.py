"""Training and results without the target modules' own weights, and the decay of a product, against plain torch."""

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import nn

from fedlora.config import ModelConfig, TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models.load import Pretrained
from fedlora.models.peft import is_adapter, save_model
from fedlora.models.slots import find_targets
from fedlora.tasks.texts import encode
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job, batches
from fedlora.types import BaseUpdate, Factors, Model, ProductDecay, Train

ROLES = frozenset({("shared", "A"), ("shared", "B")})
SETTINGS = TrainConfig(batch_size=8, lr=3e-3, epochs=2)


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's Conv1D stores its weight the other way round."""
    return tiny.save_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def pretrained(folder: Path) -> Pretrained:
    return tiny.load_model(ModelConfig(source=str(folder)), tiny.CLASSES, seed=5)


@pytest.fixture
def trainer(pretrained: Pretrained) -> Trainer:
    return Trainer(
        pretrained, find_targets(pretrained.model, "all-linear"), SETTINGS, torch.device("cpu"), torch.float32, tiny.objective()
    )


@pytest.fixture
def data(pretrained: Pretrained) -> Encoded:
    texts, labels = tiny.examples(21, 4)
    return encode(pretrained.processor, texts, np.array([tiny.CLASSES.index(x) for x in labels]), 64)


def factors(trainer: Trainer, rank: int, scale: float = 1.0, seed: int = 3) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, i, generator=g) / i**0.5 for m, (_, i) in trainer.shapes.items()}
    B = {m: torch.randn(o, rank, generator=g) / rank**0.5 for m, (o, _) in trainer.shapes.items()}
    return Factors(A, B, scale)


class Factorised(nn.Module):
    """scale * B A x + b, the weight formed, with an optional part of it that is fixed."""

    def __init__(self, old: nn.Module, A: torch.Tensor, B: torch.Tensor, scale: float, fixed: torch.Tensor | None) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A.clone()), nn.Parameter(B.clone()), scale
        self.bias, self.fixed = old.bias, fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        W = self.scale * self.B @ self.A + (0 if self.fixed is None else self.fixed)
        return nn.functional.linear(x, W, self.bias)


def plain_model(folder: Path, pretrained: Pretrained, f: Factors, fixed: dict[str, torch.Tensor]) -> nn.Module:
    """The same model by transformers alone, every target module replaced."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    head = {name: p.detach().clone() for name, p in pretrained.model.named_parameters() if name in pretrained.head}
    model.load_state_dict(head, strict=False)
    model.requires_grad_(False)
    for m in f.A:
        parent, _, name = m.rpartition(".")
        new = Factorised(model.get_submodule(m), f.A[m], f.B[m], f.scale, fixed.get(m))
        setattr(model.get_submodule(parent), name, new)
    return model


def train(model: nn.Module, data: Encoded, modules: list[str], decay: float) -> float:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], SETTINGS.lr, weight_decay=SETTINGS.weight_decay
    )
    total = 0.0
    for where in batches(Job(Train({}, frozenset()), data, 7, {}), SETTINGS):
        rows = [torch.tensor(data.inputs[i].astype(np.int64)) for i in where]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.tensor(data.targets[where])).loss
        total += loss.item() * len(where)
        layers = [model.get_submodule(m) for m in modules]
        (loss + decay * sum(((x.B @ x.A) ** 2).sum() for x in layers)).backward()
        if SETTINGS.clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], SETTINGS.clip)
        optimizer.step()
        optimizer.zero_grad()
    return total / (2 * len(data))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.base.parameters.items()}


@pytest.mark.parametrize("decay, merged", [(0.0, False), (0.05, False), (0.05, True)])
def test_training_equals_a_model_whose_targets_are_products(folder, pretrained, trainer, data, decay, merged) -> None:
    start, pair = factors(trainer, 5, 0.8), factors(trainer, 2, 0.3, seed=9)
    base = BaseUpdate(0, 1, (pair,)) if merged else BaseUpdate()
    fixed = {m: pair.scale * pair.B[m] @ pair.A[m] for m in start.A} if merged else {}
    penalty = ProductDecay("shared", decay) if decay else None
    outcome = tiny.train_one(trainer, Job(Train({"shared": start}, ROLES, penalty=penalty, base=base, drop_base=True), data, 7, {}))
    model = plain_model(folder, pretrained, start, fixed)
    assert outcome.trained.loss == pytest.approx(train(model, data, list(start.A), decay), abs=1e-4)
    done = outcome.trained.slots["shared"]
    for m in start.A:
        layer = model.get_submodule(m)
        torch.testing.assert_close(done.A[m], layer.A.detach(), atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(done.B[m], layer.B.detach(), atol=2e-4, rtol=1e-3)
        assert not torch.equal(done.A[m], start.A[m])


def test_the_decay_is_of_the_product_and_makes_a_difference(trainer, data) -> None:
    start = factors(trainer, 5)

    def norm(decay: float) -> float:
        ask = Train({"shared": start}, ROLES, penalty=ProductDecay("shared", decay), drop_base=True)
        outcome = tiny.train_one(trainer, Job(ask, data, 7, {}))
        done = outcome.trained.slots["shared"]
        return sum(float((done.B[m] @ done.A[m]).square().sum()) for m in start.A)

    assert norm(1.0) < 0.98 * norm(0.0)


def test_the_model_is_put_back_bit_for_bit(trainer, data) -> None:
    pair, start = factors(trainer, 2, seed=9), factors(trainer, 5)
    trainer.fold(BaseUpdate(0, 1, (pair,)))
    before = weights(trainer)
    inside = []
    job = Job(Train({"shared": start}, ROLES, base=BaseUpdate(1, 1), drop_base=True), data, 7, {})
    list(trainer.train(deque([job]), lambda n: inside.append(weights(trainer))))
    tiny.logits(trainer, Model({"shared": start}, BaseUpdate(1, 1), drop_base=True), {}, data)
    after = weights(trainer)
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    targets = {f"{m}.weight" for m in trainer.shapes}
    assert targets == {name for name, x in before.items() if not torch.equal(x, inside[0][name])}  # while it trained


def dense_result(trainer: Trainer, seed: int = 1) -> Model:
    g = torch.Generator().manual_seed(seed)
    dense = {m: torch.randn(o, i, generator=g) / i**0.5 for m, (o, i) in trainer.shapes.items()}
    return Model(base=BaseUpdate(0, 1, dense=dense), drop_base=True)


@pytest.mark.parametrize("kind", ["dense", "slot", "slot on merged pairs"])
def test_a_result_is_scored_and_exported_as_the_model_that_it_is(folder, pretrained, trainer, data, kind, tmp_path) -> None:
    slot, pair = factors(trainer, 5, 0.8), factors(trainer, 2, 0.3, seed=9)
    results = {
        "dense": dense_result(trainer),
        "slot": Model({"shared": slot}, drop_base=True),
        "slot on merged pairs": Model({"shared": slot}, BaseUpdate(0, 1, (pair,)), drop_base=True),
    }
    result = results[kind]
    formed = {
        "dense": result.base.dense,
        "slot": {m: 0.8 * slot.B[m] @ slot.A[m] for m in slot.A},
        "slot on merged pairs": {m: 0.8 * slot.B[m] @ slot.A[m] + 0.3 * pair.B[m] @ pair.A[m] for m in slot.A},
    }[kind]
    nothing = Factors(
        {m: torch.zeros(1, x.shape[1]) for m, x in formed.items()}, {m: torch.zeros(len(x), 1) for m, x in formed.items()}
    )
    want = plain_logits(plain_model(folder, pretrained, nothing, dict(formed)), data)
    np.testing.assert_allclose(tiny.logits(trainer, result, {}, data), want, atol=2e-5)
    assert np.abs(want - tiny.logits(trainer, Model(), {}, data)).max() > 1e-2
    assert not is_adapter(result)
    save_model(tiny.load_model(ModelConfig(source=str(folder)), tiny.CLASSES, seed=5), result, tmp_path)
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(plain_logits(exported, data), want, atol=2e-5)


@torch.no_grad()
def plain_logits(model: nn.Module, data: Encoded) -> np.ndarray:
    return np.array([model(input_ids=torch.tensor(row.astype(np.int64))[None]).logits[0].tolist() for row in data.inputs])
