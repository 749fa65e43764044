"""The trainer against an independent loop: a PEFT model, torch's own AdamW, the same batches."""

from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers

from fedlora.config import ModelConfig, TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models.load import Pretrained, from_config
from fedlora.models.slots import find_targets
from fedlora.tasks.texts import encode
from fedlora.training import learner
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job, batches
from fedlora.types import BASE, FULL, BaseUpdate, Factors, Model, TailNorm, Train

AB = frozenset({("shared", "A"), ("shared", "B")})
SETTINGS = TrainConfig(batch_size=8, lr=5e-3, epochs=2)


def make(pretrained: Pretrained, settings: TrainConfig = SETTINGS) -> Trainer:
    return Trainer(
        pretrained, find_targets(pretrained.model, "all-linear"), settings, torch.device("cpu"), torch.float32, tiny.objective()
    )


def adapter(trainer: Trainer, rank: int = 4, seed: int = 3, zero_b: bool = False) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, i, generator=g) / i**0.5 for m, (_, i) in trainer.shapes.items()}
    B = {m: torch.zeros(o, rank) if zero_b else torch.randn(o, rank, generator=g) * 0.1 for m, (o, _) in trainer.shapes.items()}
    return Factors(A, B, 2.0)


@pytest.fixture
def pretrained(bert_folder: Path) -> Pretrained:
    return tiny.load_model(ModelConfig(source=str(bert_folder)), tiny.CLASSES, seed=5)


@pytest.fixture
def data(pretrained: Pretrained) -> Encoded:
    texts, labels = tiny.examples(21, 4)
    return encode(pretrained.processor, texts, np.array([tiny.CLASSES.index(x) for x in labels]), 64)


def run(trainer: Trainer, ask: Train, data: Encoded, seed: int = 7, head: dict[str, torch.Tensor] | None = None):
    outcome = tiny.train_one(trainer, Job(ask, data, seed, head or {}))
    return outcome


def peft_model(folder: Path, pretrained: Pretrained, factors: Factors, train: set[str]) -> torch.nn.Module:
    """The same model by transformers and PEFT alone."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    state = dict(base.named_parameters())
    for name in pretrained.head:
        state[name].data = dict(pretrained.model.named_parameters())[name].data.clone()
    rank = next(iter(factors.A.values())).shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=factors.scale * rank, lora_dropout=0.0, target_modules=list(factors.A))
    wrapped = peft.get_peft_model(base, config).eval()
    for m in factors.A:
        layer = wrapped.base_model.model.get_submodule(m)
        layer.lora_A["default"].weight.data = factors.A[m].clone()
        layer.lora_B["default"].weight.data = factors.B[m].clone()
    for name, p in wrapped.named_parameters():
        p.requires_grad_(any(f"lora_{role}" in name for role in train))
    return wrapped


def oracle_batches(data: Encoded, settings: TrainConfig, seed: int, epochs: int):
    job = Job(Train({}, frozenset(), epochs=epochs), data, seed, {})
    for where in batches(job, settings):
        rows = [torch.tensor(data.inputs[i].astype(np.int64)) for i in where]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        yield ids, (ids != 0).long(), torch.tensor(data.targets[where])


def oracle(wrapped, data, settings=SETTINGS, seed=7, epochs=2, ratio=1.0, clip=None, penalty=None):
    groups = [
        {"params": [p for n, p in wrapped.named_parameters() if p.requires_grad and "lora_B" in n], "lr": settings.lr * ratio},
        {"params": [p for n, p in wrapped.named_parameters() if p.requires_grad and "lora_B" not in n], "lr": settings.lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    total = count = 0
    for ids, mask, labels in oracle_batches(data, settings, seed, epochs):
        loss = wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss
        total, count = total + loss.item() * len(labels), count + len(labels)
        (loss + penalty(wrapped) if penalty else loss).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in wrapped.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
    return total / count


def factors_of(wrapped, modules):
    layers = {m: wrapped.base_model.model.get_submodule(m) for m in modules}
    return {m: x.lora_A["default"].weight.detach() for m, x in layers.items()}, {
        m: x.lora_B["default"].weight.detach() for m, x in layers.items()
    }


@pytest.mark.parametrize("train", [{"A", "B"}, {"A"}, {"B"}])
def test_training_equals_peft(train: set[str], bert_folder: Path, pretrained: Pretrained, data: Encoded) -> None:
    trainer = make(pretrained)
    start = adapter(trainer)
    wrapped = peft_model(bert_folder, pretrained, start, train)
    loss = oracle(wrapped, data)
    outcome = run(trainer, Train({"shared": start}, frozenset(("shared", role) for role in train)), data)
    A, B = factors_of(wrapped, start.A)
    done = outcome.trained.slots["shared"]
    for m in start.A:
        torch.testing.assert_close(done.A[m], A[m], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(done.B[m], B[m], atol=1e-4, rtol=1e-4)
        assert torch.equal(done.A[m], start.A[m]) == ("A" not in train)
        assert torch.equal(done.B[m], start.B[m]) == ("B" not in train)
    assert outcome.trained.loss == pytest.approx(loss, abs=1e-5)
    assert outcome.trained.num_steps == 2 * 3  # 21 examples in batches of 8


def test_learning_rates_clipping_and_penalty_equal_peft(bert_folder: Path, pretrained: Pretrained, data: Encoded) -> None:
    settings = SETTINGS.model_copy(update={"clip": 0.05})
    trainer = make(pretrained, settings)
    start = adapter(trainer)
    wrapped = peft_model(bert_folder, pretrained, start, {"A", "B"})

    def tail(model: torch.nn.Module) -> torch.Tensor:
        layers = [model.base_model.model.get_submodule(m) for m in start.A]
        return 0.5 * sum(x.lora_B["default"].weight[:, 3:].norm() * x.lora_A["default"].weight[3:].norm() for x in layers)

    oracle(wrapped, data, settings, epochs=1, ratio=5.0, clip=0.05, penalty=tail)
    ask = Train({"shared": start}, AB, epochs=1, lr_scale={"B": 5.0}, penalty=TailNorm("shared", 3, 0.5))
    done = run(trainer, ask, data).trained.slots["shared"]
    A, B = factors_of(wrapped, start.A)
    for m in start.A:
        torch.testing.assert_close(done.A[m], A[m], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(done.B[m], B[m], atol=2e-4, rtol=1e-3)


def test_full_fine_tuning_and_head_equal_plain_torch(bert_folder: Path, pretrained: Pretrained, data: Encoded) -> None:
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=3).eval()
    for name in pretrained.head:
        plain.get_parameter(name).data = pretrained.model.get_parameter(name).data.clone()
    sgd = TrainConfig(
        batch_size=8, lr=0.05, epochs=2, optimizer="sgd", weight_decay=0.1
    )  # AdamW blows up gradients that are rounding
    optimizer = torch.optim.SGD(plain.parameters(), lr=sgd.lr, weight_decay=sgd.weight_decay)
    for ids, mask, labels in oracle_batches(data, sgd, 7, 2):
        plain(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in pretrained.model.named_parameters()}
    trainer = make(pretrained, sgd)
    outcome = run(trainer, Train({}, FULL), data, head=trainer.head)
    assert set(outcome.trained.full) | set(outcome.head) == set(before)
    for name, delta in outcome.trained.full.items():
        torch.testing.assert_close(before[name] + delta, plain.get_parameter(name).detach(), atol=1e-5, rtol=1e-4)
    for name, p in outcome.head.items():
        torch.testing.assert_close(p, plain.get_parameter(name).detach(), atol=1e-5, rtol=1e-4)
    # The resident model is as it was: the next client starts from the pre-trained weights.
    again = run(trainer, Train({}, FULL), data, head=trainer.head)
    assert all(torch.equal(again.trained.full[name], outcome.trained.full[name]) for name in outcome.trained.full)
    # A request starts from the change that it carries.
    one = run(trainer, Train({}, FULL, max_steps=1), data).trained
    zero = run(trainer, Train({}, FULL, max_steps=0, full=one.full), data).trained
    assert all(torch.allclose(zero.full[n], one.full[n], atol=1e-7) for n in one.full)


def test_masked_entries_stay_bit_identical(pretrained: Pretrained, data: Encoded) -> None:
    trainer = make(pretrained)
    start = adapter(trainer)
    mask = {m: torch.tensor([True, False, True, False]) for m in start.B}
    done = run(trainer, Train({"shared": start}, frozenset({("shared", "B")}), mask={("shared", "B"): mask}), data).trained.slots[
        "shared"
    ]
    for m in start.B:
        assert torch.equal(done.B[m][:, 1], start.B[m][:, 1]) and torch.equal(done.B[m][:, 3], start.B[m][:, 3])
        assert not torch.equal(done.B[m][:, 0], start.B[m][:, 0])


def test_a_mask_acts_before_clipping(pretrained: Pretrained, data: Encoded) -> None:
    """Masking two of four ranks equals training an adapter of those two alone beside the others, clipped by their norm only."""
    settings = SETTINGS.model_copy(update={"clip": 0.01, "optimizer": "sgd", "weight_decay": 0.0, "lr": 1.0})
    trainer = make(pretrained, settings)
    start = adapter(trainer)
    mask = {m: torch.tensor([True, False, True, False]) for m in start.B}
    masked = run(trainer, Train({"shared": start}, frozenset({("shared", "B")}), mask={("shared", "B"): mask}), data).trained.slots[
        "shared"
    ]
    own = Factors({m: a[[0, 2]] for m, a in start.A.items()}, {m: b[:, [0, 2]] for m, b in start.B.items()}, start.scale)
    rest = Factors({m: a[[1, 3]] for m, a in start.A.items()}, {m: b[:, [1, 3]] for m, b in start.B.items()}, start.scale)
    split = run(trainer, Train({"own": own, "rest": rest}, frozenset({("own", "B")})), data).trained.slots
    for m in start.B:
        torch.testing.assert_close(masked.B[m][:, [0, 2]], split["own"].B[m], atol=1e-5, rtol=1e-5)


def test_slots_add_up_to_the_dense_formula(pretrained: Pretrained, data: Encoded, bert_folder: Path) -> None:
    """y = W x + b + sum_s scale_s D_s (B_s C_s A_s x), checked by merging the products into the weights."""
    trainer = make(pretrained)
    one, two = adapter(trainer, seed=1), adapter(trainer, rank=2, seed=2)
    g = torch.Generator().manual_seed(0)
    one = replace(one, C={m: torch.randn(4, 4, generator=g) for m in one.A})
    two = replace(
        two,
        C={m: torch.randn(2, generator=g) for m in two.A},
        D={m: torch.randn(o, generator=g) for m, (o, _) in trainer.shapes.items()},
    )
    got = tiny.logits(trainer, Model({"one": one, "two": two}), {}, data)
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=3).eval()
    for name in pretrained.head:
        dense.get_parameter(name).data = trainer.pretrained[name].clone()
    for m in one.A:
        W = one.scale * one.B[m] @ one.C[m] @ one.A[m]
        W = W + two.scale * torch.diag(two.D[m]) @ two.B[m] @ torch.diag(two.C[m]) @ two.A[m]
        dense.get_submodule(m).weight.data += W
    want = [dense(input_ids=torch.tensor(row.astype(np.int64))[None]).logits[0].tolist() for row in data.inputs]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_gradient_is_the_mean_over_steps(pretrained: Pretrained, data: Encoded) -> None:
    """With SGD at rate 1, no decay: the change of a round is minus the sum of the gradients."""
    trainer = make(pretrained, TrainConfig(batch_size=8, lr=1.0, optimizer="sgd", weight_decay=0.0))
    start = adapter(trainer)
    trained = run(trainer, Train({"shared": start}, AB, want_grad=True), data).trained
    for m in start.B:
        moved = trained.slots["shared"].B[m] - start.B[m]
        torch.testing.assert_close(moved, -trained.num_steps * trained.grad["shared", "B"][m], atol=1e-5, rtol=1e-4)


def test_same_seed_same_bits_and_other_seed_other_batches(pretrained: Pretrained, data: Encoded) -> None:
    trainer = make(pretrained)
    start = adapter(trainer)
    one, two, other = (run(trainer, Train({"shared": start}, AB), data, seed).trained.slots["shared"] for seed in (1, 1, 2))
    assert all(torch.equal(one.A[m], two.A[m]) and torch.equal(one.B[m], two.B[m]) for m in start.A)
    assert any(not torch.equal(one.A[m], other.A[m]) for m in start.A)


def test_every_example_once_an_epoch(data: Encoded) -> None:
    job = Job(Train({}, frozenset()), data, 3, {})
    rows = list(batches(job, TrainConfig(batch_size=8, epochs=2)))
    assert [len(r) for r in rows] == [8, 8, 5, 8, 8, 5]
    first, second = np.concatenate(rows[:3]), np.concatenate(rows[3:])
    assert sorted(first) == sorted(second) == list(range(21))
    assert list(first) != list(second)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_base_updates_merge_for_every_architecture(kind: str, data: Encoded) -> None:
    """A merged pair and the same pair as a slot are one function; Conv1D stores its weight the other way round."""
    trainer = make(from_config(tiny.config(kind), tiny.tokenizer(), seed=1))
    pair = adapter(trainer)
    as_slot = tiny.logits(trainer, Model({"shared": pair}), {}, data)
    plain = tiny.logits(trainer, Model(), {}, data)
    merged = tiny.logits(trainer, Model(base=BaseUpdate(0, 1, (pair,))), {}, data)
    np.testing.assert_allclose(merged, as_slot, atol=2e-4)
    assert np.abs(merged - plain).max() > 1e-2


def test_a_base_has_the_same_bits_however_it_got_there(bert_folder: Path, data: Encoded) -> None:
    def fresh() -> Trainer:
        return make(tiny.load_model(ModelConfig(source=str(bert_folder)), tiny.CLASSES, seed=5))

    one, two = fresh(), fresh()
    pairs = tuple(adapter(one, seed=s) for s in (1, 2, 3))
    for v in (1, 2, 3):
        one.fold(BaseUpdate(v - 1, v, pairs[v - 1 : v]))
    two.fold(BaseUpdate(0, 3, pairs))
    two.fold(BaseUpdate(0, 3, pairs))  # nothing twice
    assert all(torch.equal(one.base.parameters[n], two.base.parameters[n]) for n in one.base.parameters)
    assert not one.fold(BaseUpdate(4, 5, pairs[:1])) and one.version == 3


def test_a_masked_full_update_moves_only_its_entries(pretrained: Pretrained, data: Encoded) -> None:
    trainer = make(pretrained)
    name = f"{next(iter(trainer.shapes))}.weight"
    mask = torch.zeros(trainer.params[name], dtype=torch.bool)
    mask[0, :3] = True
    full = run(trainer, Train({}, FULL, mask={(BASE, "W"): {name: mask}}), data).trained.full
    assert set(full) == {name}
    assert (full[name][mask] != 0).all() and (full[name][~mask] == 0).all()


def test_with_rows_of_1_each_client_trains_by_itself_and_to_the_same_bits(pretrained: Pretrained, data: Encoded) -> None:
    """Steps of three clients: as many as batches, where a step else takes a batch of each."""
    trainer = make(pretrained, SETTINGS.model_copy(update={"rows": 1}))
    start = adapter(trainer)
    ask = Train({"s": start}, frozenset({("s", "A"), ("s", "B")}), epochs=1)
    jobs = [Job(ask, data.take(np.arange(0, count)), count, {}) for count in (21, 9, 16)]
    alone = [tiny.train_one(trainer, job) for job in jobs]
    steps: list[int] = []
    together = dict(trainer.train(deque(jobs), steps.append))
    assert len(steps) == sum(-(-len(job.data) // SETTINGS.batch_size) for job in jobs)
    for job, want in zip(jobs, alone, strict=True):
        got = together[job].trained.slots["s"]
        assert all(torch.equal(got.B[m], x) for m, x in want.trained.slots["s"].B.items())
    trainer.rows = 2048
    steps.clear()
    dict(trainer.train(deque(jobs), steps.append))
    assert len(steps) == max(-(-len(job.data) // SETTINGS.batch_size) for job in jobs)


def test_few_clients_share_a_step_where_each_trains_much(
    pretrained: Pretrained, data: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of eight have room, of one text each."""
    trainer = make(pretrained)
    ask = Train({"shared": adapter(trainer)}, AB, epochs=1)
    trained = 4 * sum(map(sum, trainer.shapes.values()))
    together: list[int] = []
    step = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda learners: together.append(len(learners)) or step(learners))

    def played() -> list[int]:
        together.clear()
        list(trainer.train(deque(Job(ask, data.take(np.array([i])), i, {}) for i in range(8))))
        return together

    assert played() == [8]
    monkeypatch.setattr(learner, "TRAINED_OF_ROW", 2.5 * trained / trainer.rows)
    assert played() == [3, 3, 2]
    monkeypatch.setattr(learner, "TRAINED_OF_ROW", 0.9 * trained / trainer.rows)
    assert played() == [1] * 8
