"""A routed mixture of experts and several domains in the trainer, against a plain torch model with its own layers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from toy import tensors

from fedlora.config import ModelConfig, TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models.load import Pretrained
from fedlora.models.slots import LiveRouter, find_targets, route
from fedlora.tasks.texts import encode
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job, batches
from fedlora.training.score import ScoreJob
from fedlora.types import GATE, ByDomain, Factors, Model, Router, Train

SETTINGS = TrainConfig(batch_size=8, lr=5e-3, epochs=2)
TASKS = {"two": range(1), "one": range(1, 3)}


@pytest.fixture
def pretrained(bert_folder: Path) -> Pretrained:
    return tiny.load_model(ModelConfig(source=str(bert_folder)), tiny.CLASSES, seed=5)


@pytest.fixture
def data(pretrained: Pretrained) -> Encoded:
    texts, labels = tiny.examples(21, 4)
    return encode(pretrained.processor, texts, np.array([tiny.CLASSES.index(x) for x in labels]), 64)


def make(pretrained: Pretrained, domains=None) -> Trainer:
    targets = find_targets(pretrained.model, "all-linear")
    return Trainer(pretrained, targets, SETTINGS, torch.device("cpu"), torch.float32, tiny.objective(**(domains or {})))


def adapter(trainer: Trainer, seed: int, rank: int = 3) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, i, generator=g) / i**0.5 for m, (_, i) in trainer.shapes.items()}
    return Factors(A, {m: 0.2 * torch.randn(o, rank, generator=g) for m, (o, _) in trainer.shapes.items()}, 1.5)


def router(trainer: Trainer, own: str, others: tuple[str, ...], renormalise: bool = True) -> Router:
    g = torch.Generator().manual_seed(11)
    places = 2 * len(others) + 1
    G = {m: torch.randn(places, i, generator=g) / i**0.5 for m, (_, i) in trainer.shapes.items()}
    return Router(G, own, others, renormalise)


class Mixture(torch.nn.Module):
    """One layer of FedLEASE, an input vector at a time as the paper writes it."""

    def __init__(self, inner, own, others, G, scale: float, renormalise: bool) -> None:
        super().__init__()
        self.inner, self.scale, self.renormalise = inner, scale, renormalise
        self.A, self.B, self.G = (torch.nn.Parameter(x.clone()) for x in (*own, G))
        self.others = others

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        count, rows = len(self.others) + 1, []
        experts = [(self.A, self.B)] * count + self.others
        for v in flat:
            p = torch.softmax(self.G @ v, dim=0)
            best = sorted(range(len(p)), key=lambda i: -float(p[i].detach()))[:count]
            total = sum(p[i] for i in best) if self.renormalise else 1.0
            rows.append(sum(p[i] / total * self.scale * (experts[i][1] @ (experts[i][0] @ v)) for i in best))
        return self.inner(x) + torch.stack(rows).reshape(*x.shape[:-1], -1)


def mixture_model(folder: Path, pretrained: Pretrained, slots, gate: Router):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval().requires_grad_(False)
    for name in pretrained.head:
        model.get_parameter(name).data = pretrained.model.get_parameter(name).detach().clone()
    layers = {}
    for m, G in gate.G.items():
        parent, _, name = m.rpartition(".")
        others = [(slots[s].A[m], slots[s].B[m]) for s in gate.others]
        own = slots[gate.own]
        layers[m] = Mixture(model.get_submodule(m), (own.A[m], own.B[m]), others, G, own.scale, gate.renormalise)
        setattr(model.get_submodule(parent), name, layers[m])
    return model, layers


def padded(data: Encoded, where):
    rows = [torch.tensor(data.inputs[i].astype(np.int64)) for i in where]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("renormalise", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_routed_mixture_trains_as_a_plain_torch_model(bert_folder, pretrained, data, renormalise: bool) -> None:
    data = data.take(np.arange(12))
    trainer = make(pretrained)
    slots = {f"expert{j}": adapter(trainer, j) for j in range(3)}
    gate = router(trainer, "expert1", ("expert0", "expert2"), renormalise)
    model, layers = mixture_model(bert_folder, pretrained, slots, gate)
    before = model(**padded(data, range(12))).logits.detach().numpy()
    np.testing.assert_allclose(tiny.logits(trainer, Model(slots, gate=gate), {}, data), before, atol=1e-5)

    ask = Train(slots, frozenset({("expert1", "A"), ("expert1", "B"), (GATE, "G")}), gate=gate)
    outcome = tiny.train_one(trainer, Job(ask, data, 7, {}))
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    total = 0.0
    for where in batches(Job(ask, data, 7, {}), SETTINGS):
        loss = torch.nn.functional.cross_entropy(model(**padded(data, where)).logits, torch.tensor(data.targets[where]))
        total += loss.item() * len(where)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    done = outcome.trained
    assert done.loss == pytest.approx(total / 24, abs=1e-4)
    for m, layer in layers.items():
        torch.testing.assert_close(done.slots["expert1"].A[m], layer.A.detach(), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(done.slots["expert1"].B[m], layer.B.detach(), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(done.gate.G[m], layer.G.detach(), atol=1e-3, rtol=1e-3)
        assert not torch.equal(done.gate.G[m], gate.G[m])
        for other in ("expert0", "expert2"):  # bit for bit
            assert torch.equal(done.slots[other].A[m], slots[other].A[m]) and torch.equal(done.slots[other].B[m], slots[other].B[m])
    after = model(**padded(data, range(12))).logits.detach().numpy()
    np.testing.assert_allclose(tiny.logits(trainer, Model(done.slots, gate=done.gate), {}, data), after, atol=1e-2)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(tiny.logits(trainer, Model(slots, gate=gate), {}, data), before, atol=1e-5)  # nothing stays behind


def test_chosen_weights_sum_to_one_and_between_one_and_all_experts_answer() -> None:
    g = torch.Generator().manual_seed(0)
    G, x = torch.randn(7, 5, generator=g), torch.randn(40, 5, generator=g)
    weights = route(x, LiveRouter(G, 2, (0, 1, 3), renormalise=True))
    assert weights.shape == (40, 4) and bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(40))
    used = (weights > 0).sum(dim=1)
    assert used.min() >= 1 and used.max() == 4 and len(used.unique()) > 2
    raw = route(x, LiveRouter(G, 2, (0, 1, 3), renormalise=False))
    torch.testing.assert_close(raw / raw.sum(dim=1, keepdim=True), weights)
    assert bool((raw.sum(dim=1) < 1).all())


def test_of_equal_places_the_own_expert_wins() -> None:
    weights = route(torch.randn(3, 5), LiveRouter(torch.zeros(5, 5), 1, (0, 2), renormalise=True))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0, 0.0]] * 3))


def test_an_example_sees_the_classes_of_its_domain_only(bert_folder, pretrained, data) -> None:
    domains = (data.targets > 0).astype(np.int64)  # class 0 is domain "two", 1 and 2 are domain "one"
    several, plain = replace(data, domains=domains), data
    trainer = make(pretrained, TASKS)
    slots = {"shared": adapter(trainer, 1)}
    free, own = tiny.logits(trainer, Model(slots), {}, plain), tiny.logits(trainer, Model(slots), {}, several)
    for row, logits, t in zip(own, free, domains, strict=True):
        keep = np.array([t == 0, t == 1, t == 1])
        assert np.array_equal(row[keep], logits[keep]) and np.isneginf(row[~keep]).all()
    assert (own.argmax(axis=1)[domains == 0] == 0).all() and (own.argmax(axis=1)[domains == 1] > 0).all()
    one_step = Train(slots, frozenset({("shared", "B")}), epochs=1)
    outcome = tiny.train_one(trainer, Job(one_step, several.take(np.arange(8)), 0, {}))
    first = zip(free[:8].astype(np.float64), data.targets[:8], strict=True)
    expected = [np.log(np.exp(row[1:]).sum()) - row[y] if y else 0.0 for row, y in first]
    assert outcome.trained.loss == pytest.approx(np.mean(expected), abs=1e-5)
    assert all(bool(x.isfinite().all()) for x in outcome.trained.slots["shared"].B.values())


def test_training_on_one_domain_is_training_on_its_examples_alone(pretrained, data) -> None:
    several = replace(data, domains=(data.targets > 0).astype(np.int64))
    trainer = make(pretrained, TASKS)
    ask = Train({"shared": adapter(trainer, 1)}, frozenset({("shared", "A"), ("shared", "B")}), data="one")
    got = tiny.train_one(trainer, Job(ask, several, 3, {}))
    own = np.flatnonzero(data.targets > 0)
    assert 0 < len(own) < len(data)
    expected = tiny.train_one(trainer, Job(replace(ask, data=""), several.take(own), 3, {}))
    assert got.trained.num_steps == expected.trained.num_steps == 2 * -(-len(own) // 8)
    for m in trainer.shapes:
        assert torch.equal(got.trained.slots["shared"].B[m], expected.trained.slots["shared"].B[m])
    assert got.trained.loss == expected.trained.loss


def test_a_gate_by_domain_runs_each_example_through_its_domains_slot(pretrained, data) -> None:
    domains = (data.targets > 0).astype(np.int64)
    several = replace(data, domains=domains)
    trainer = make(pretrained, TASKS)
    a, b = adapter(trainer, 1), adapter(trainer, 2)
    got = tiny.logits(trainer, Model({"s0": a, "s1": b}, gate=ByDomain({"one": "s0", "two": "s1"})), {}, several)
    by_a, by_b = (tiny.logits(trainer, Model({"x": f}), {}, several) for f in (a, b))
    np.testing.assert_allclose(got[domains == 1], by_a[domains == 1], atol=1e-5)
    np.testing.assert_allclose(got[domains == 0], by_b[domains == 0], atol=1e-5)
    finite = np.isfinite(by_a)
    assert np.abs(by_a[finite] - by_b[finite]).max() > 0.1
    partly = tiny.logits(trainer, Model({"s0": a}, gate=ByDomain({"one": "s0"})), {}, several)
    np.testing.assert_allclose(partly[domains == 0], tiny.logits(trainer, Model(), {}, several)[domains == 0], atol=1e-5)


def test_all_that_a_model_is_made_of_goes_to_the_trainers_device(pretrained: Pretrained, data: Encoded) -> None:
    """Told on a device of shapes alone: a router that stayed on the CPU failed on every GPU."""
    cpu = make(pretrained)
    slots = {"one": adapter(cpu, 1), "two": adapter(cpu, 2)}
    gate = router(cpu, "one", ("two",))
    away = Trainer(pretrained, list(cpu.shapes), SETTINGS, torch.device("meta"), torch.float32, tiny.objective())
    part = away.scorer.part(ScoreJob(Model(slots, gate=gate), dict(cpu.head), data))
    found = [*tensors(part.slots), *tensors(part.head), *tensors(part.gate)]
    assert len(found) == 5 * len(cpu.shapes) + len(cpu.head) and {x.device.type for x in found} == {"meta"}
