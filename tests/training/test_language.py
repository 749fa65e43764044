"""Language models in the trainer against PEFT and transformers, one unpadded text at a time: losses, gradients, what they write."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import architectures
import numpy as np
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlora.config import TrainConfig
from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.models import likelihood
from fedlora.models.load import Pretrained
from fedlora.models.packing import Shared
from fedlora.models.slots import find_targets
from fedlora.models.trial import try_model
from fedlora.tasks.language import Answers
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job
from fedlora.training.score import ScoreJob, prompted
from fedlora.types import BASE, Factors, Model, Train

AB = frozenset({("shared", "A"), ("shared", "B")})
ONE_STEP = TrainConfig(batch_size=16, lr=1.0, optimizer="sgd", weight_decay=0.0, clip=None)
CPU = torch.device("cpu")


def language_model(name: str) -> Pretrained:
    model, tokenizer = architectures.causal(name)
    return Pretrained(model.requires_grad_(False), tokenizer, "", peft_task="CAUSAL_LM", keeps_head=True)


def make(pretrained: Pretrained, settings: TrainConfig = ONE_STEP, dtype: torch.dtype = torch.float64) -> Trainer:
    targets = find_targets(pretrained.model, "all-linear")
    findings = try_model(pretrained.model, targets, 64, len(pretrained.processor), (), 1, tokens=True)
    assert findings.form.shared is Shared.PACKED and not findings.form.apart
    objective = Answers(Schema(), ("answer_loss",), pretrained.processor, architectures.CAUSAL_VOCAB, 8)
    return Trainer(pretrained, targets, settings, CPU, dtype, objective, findings.form)


def examples(count: int, seed: int) -> Encoded:
    """Texts of 2 to 30 tokens with the loss on some of them, in one piece or two, never on the first."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(4, 270, n).astype(np.int32) for n in rng.integers(2, 31, count)]
    trained = []
    for each in ids:
        mask = rng.random(len(each)) < 0.6
        mask[0], mask[-1] = False, True
        trained.append(mask)
    counts = np.array([mask.sum() for mask in trained], dtype=np.int64)
    return Encoded(tuple(ids), counts, np.array([len(each) for each in ids], dtype=np.int64), trained=tuple(trained))


def adapter(trainer: Trainer, seed: int, rank: int = 3) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, i, generator=draw, dtype=torch.float64) / i**0.5 for m, (_, i) in trainer.shapes.items()}
    B = {m: torch.randn(o, rank, generator=draw, dtype=torch.float64) / o**0.5 for m, (o, _) in trainer.shapes.items()}
    return Factors(A, B, 0.5)


def under_peft(name: str, factors: Factors) -> Any:
    """The same model by transformers and PEFT alone, in fp64."""
    model, _ = architectures.causal(name)
    rank = next(iter(factors.A.values())).shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=factors.scale * rank, target_modules=list(factors.A), fan_in_fan_out=name == "gpt2")
    wrapped = peft.get_peft_model(model, config).double().eval()
    for m in factors.A:
        layer = wrapped.base_model.model.get_submodule(m)
        layer.lora_A["default"].weight.data = factors.A[m].clone()
        layer.lora_B["default"].weight.data = factors.B[m].clone()
    return wrapped


def losses(model: Any, data: Encoded) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of each text alone the loss of its trained tokens, summed, (n,); and its logits (length, words)."""
    found, all_logits = [], []
    for ids, mask in zip(data.inputs, data.trained, strict=True):
        tokens = torch.from_numpy(ids.astype(np.int64))
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].double()
        each = cross_entropy(logits[:-1], tokens[1:], reduction="none")
        found.append(each[torch.from_numpy(mask[1:])].sum())
        all_logits.append(logits)
    return torch.stack(found), all_logits


def factors_of(wrapped: Any, modules: Sequence[str], role: str, grad: bool) -> dict[str, torch.Tensor]:
    weights = {m: getattr(wrapped.base_model.model.get_submodule(m), f"lora_{role}")["default"].weight for m in modules}
    return {m: (w.grad if grad else w).detach().clone() for m, w in weights.items()}


@pytest.mark.parametrize("name", architectures.CAUSAL)
def test_two_clients_in_one_packed_step_learn_what_each_learns_under_peft_text_by_text(name: str) -> None:
    """The token mean over the batch; sliding windows, soft caps, partial rotary positions, tied heads, Conv1D."""
    trainer = make(language_model(name))
    data = [examples(4, 1), examples(3, 2)]
    before = [adapter(trainer, 5), adapter(trainer, 6, rank=2)]
    asks = [Train({"shared": each}, AB, epochs=1) for each in before]
    jobs = deque(Job(ask, own, 7, {}) for ask, own in zip(asks, data, strict=True))
    outcomes = {id(job.ask): outcome.trained for job, outcome in trainer.train(jobs)}
    for ask, own, start in zip(asks, data, before, strict=True):
        wrapped = under_peft(name, start)
        found, _ = losses(wrapped, own)
        mean = found.sum() / own.targets.sum()
        mean.backward()
        trained = outcomes[id(ask)]
        assert trained.loss == pytest.approx(mean.item(), rel=1e-6)
        for role in ("A", "B"):
            grads = factors_of(wrapped, list(start.A), role, grad=True)
            for m, was in start.role(role).items():
                moved = was - trained.slots["shared"].role(role)[m]  # norms and rotations compute in fp32 whatever the model does
                torch.testing.assert_close(moved, grads[m], atol=1e-6 * float(grads[m].abs().max()) + 1e-9, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama/tied", "gemma2", "gpt2"])
def test_scores_are_those_of_each_text_alone(name: str) -> None:
    trainer, data = make(language_model(name)), examples(9, 3)
    start = adapter(trainer, 8)
    (outputs,) = trainer.outputs([ScoreJob(Model({"shared": start}), {}, data)])
    wanted, logits = losses(under_peft(name, start), data)
    np.testing.assert_allclose(outputs[:, 0], wanted.detach().numpy(), rtol=1e-6)
    right = [
        int((x[:-1].argmax(-1).numpy() == ids[1:])[mask[1:]].sum())
        for x, ids, mask in zip(logits, data.inputs, data.trained, strict=True)
    ]
    assert outputs[:, 1].tolist() == right
    (sums,) = trainer.sums([ScoreJob(Model({"shared": start}), {}, data)])
    scores = trainer.objective.scores(sums)
    assert scores == {"answer_loss": pytest.approx(wanted.sum().item() / data.targets.sum())}
    assert sums["right"].tolist() == [sum(right)] and sums["examples"].tolist() == [9]


def test_pieces_of_a_batch_give_the_gradient_of_the_whole() -> None:
    data, after = examples(9, 3), []
    for micro in (None, 40, 1):
        trainer = make(language_model("llama"), replace_settings(micro_tokens=micro))
        (_, outcome), *_ = trainer.train(deque([Job(Train({"shared": adapter(trainer, 8)}, AB, epochs=1), data, 7, {})]))
        after.append(outcome.trained)
    for other in after[1:]:
        assert other.loss == pytest.approx(after[0].loss) and other.num_steps == 1
        for m, B in after[0].slots["shared"].B.items():
            torch.testing.assert_close(other.slots["shared"].B[m], B, atol=1e-12, rtol=1e-9)


def replace_settings(**changes: Any) -> TrainConfig:
    return ONE_STEP.model_copy(update=changes)


def test_no_more_logits_are_there_at_once_than_allowed_and_each_row_meets_the_head_once(monkeypatch: Any) -> None:
    """A vocabulary of 280 and room for 1,000 logits: three rows at a time, forward and backward."""
    monkeypatch.setitem(likelihood.LOGITS, "cpu", 1000)
    trainer, data = make(language_model("llama")), examples(9, 3)
    seen: list[int] = []
    head = trainer.base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append(args[0].numel() // args[0].shape[-1]))
    start = adapter(trainer, 8)
    (_, outcome), *_ = trainer.train(deque([Job(Train({"shared": start}, AB, epochs=1), data, 7, {})]))
    assert max(seen) == 3 and sum(seen) == data.targets.sum()
    found, _ = losses(under_peft("llama", start), data)
    assert outcome.trained.loss == pytest.approx(found.sum().item() / data.targets.sum(), rel=1e-6)


def test_all_parameters_train_a_tied_head_among_them() -> None:
    trainer, data = make(language_model("llama/tied")), examples(6, 3)
    (_, outcome), *_ = trainer.train(deque([Job(Train({}, frozenset({(BASE, "W")}), epochs=1), data, 7, {})]))
    model, _ = architectures.causal("llama/tied")
    model.double()
    found, _ = losses(model, data)
    (found.sum() / data.targets.sum()).backward()
    wanted = {name: -p.grad for name, p in model.named_parameters()}
    assert set(outcome.trained.full) == set(wanted)
    for name, change in outcome.trained.full.items():
        torch.testing.assert_close(change.double(), wanted[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_what_it_writes_is_what_peft_writes(name: str) -> None:
    """Prompts of several lengths at once, with the cache; and training goes on as before, packed."""
    trainer, rng = make(language_model(name), dtype=torch.float32), np.random.default_rng(0)
    start = adapter(trainer, 8)
    start = replace(start, A={m: x.float() for m, x in start.A.items()}, B={m: x.float() for m, x in start.B.items()})
    prompts = [rng.integers(4, 270, n).astype(np.int64) for n in (3, 11, 1, 20)]
    written = trainer.generate(ScoreJob(Model({"shared": start}), {}, prompted(prompts, np.zeros(0, dtype=np.int64))), 12)
    wrapped = under_peft(name, start).float()
    stop = {wrapped.generation_config.eos_token_id, trainer.objective.tokenizer.eos_token_id}  # type: ignore[attr-defined]
    for prompt, own in zip(prompts, written, strict=True):
        ids = torch.from_numpy(prompt)[None]
        wanted: list[int] = []
        with torch.no_grad():
            while len(wanted) < 12:
                next_id = int(wrapped(input_ids=ids, use_cache=False).logits[0, -1].argmax())
                if next_id in stop:
                    break
                wanted.append(next_id)
                ids = torch.cat([ids, torch.tensor([[next_id]])], dim=1)
        assert own.tolist() == wanted
    data = examples(4, 1)
    (outputs,) = trainer.outputs([ScoreJob(Model({"shared": start}), {}, data)])
    np.testing.assert_allclose(outputs[:, 0], losses(wrapped, data)[0].detach().numpy(), rtol=1e-4)
