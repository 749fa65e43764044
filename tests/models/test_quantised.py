"""Base models in 4 and 8 bits against plain transformers, PEFT and bitsandbytes: what is loaded, learned, scored, refused."""

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import peft
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedlora.config import ModelConfig, TrainConfig
from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.models import language, load, quantised
from fedlora.models.casting import at_least_fp32, cast
from fedlora.models.load import Given, Pretrained
from fedlora.models.packing import Shared
from fedlora.models.peft import rehearse
from fedlora.models.slots import find_targets, layer_shape
from fedlora.models.trial import in_full, try_model
from fedlora.tasks.language import Answers
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job
from fedlora.training.score import ScoreJob
from fedlora.types import Factors, Model, Train

AB = frozenset({("shared", "A"), ("shared", "B")})
ONE_STEP = TrainConfig(batch_size=16, lr=1.0, optimizer="sgd", weight_decay=0.0, clip=None)
CPU = torch.device("cpu")
BITS = ("4bit", "8bit")
NEAR = 1e-5  # of the largest number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "llama", "llama/wide")


def saved(folder: Path, name: str, **changes: Any) -> Path:
    model, tokenizer = architectures.causal(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def plain(folder: Path, bits: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The same model by transformers and bitsandbytes alone, in training: with 8 bits, bitsandbytes rounds only weights there. It
    has no dropout."""
    settings = {
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "8bit": {"load_in_8bit": True},
    }
    how = {} if bits is None else {"quantization_config": BitsAndBytesConfig(**settings[bits])}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **how).train()


def loaded(folder: Path, bits: str | None, dtype: torch.dtype = torch.float32) -> Pretrained:
    return language.load(ModelConfig(source=str(folder), quantise=bits), 0, dtype=dtype)


def make(pretrained: Pretrained, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Trainer:
    targets = find_targets(pretrained.model, "all-linear")
    with in_full(pretrained.model):
        findings = try_model(pretrained.model, targets, 64, len(pretrained.processor), (), 1, tokens=True)
    assert findings.form.shared is Shared.PACKED and not findings.form.apart and len(findings.targets) == len(targets)
    objective = Answers(Schema(), ("answer_loss",), pretrained.processor, architectures.CAUSAL_VOCAB, 8)
    return Trainer(pretrained, targets, ONE_STEP, device, dtype, objective, findings.form)


def examples(count: int, seed: int) -> Encoded:
    """Texts of 2 to 30 tokens with the loss on all but the first."""
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(4, 270, n).astype(np.int32) for n in rng.integers(2, 31, count))
    counts = np.array([len(each) for each in ids], dtype=np.int64)
    return Encoded(ids, counts - 1, counts, trained=tuple(np.arange(n) > 0 for n in counts))


def adapter(trainer: Trainer, seed: int, rank: int = 3) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, i, generator=draw) / i**0.5 for m, (_, i) in trainer.shapes.items()}
    B = {m: torch.randn(o, rank, generator=draw) / o**0.5 for m, (o, _) in trainer.shapes.items()}
    return Factors(A, B, 0.5)


def exact(folder: Path, bits: str) -> Any:
    """What `plain` stands for, in plain layers and float64."""
    return plain(folder, bits).dequantize(dtype=torch.float32).double()


def under_peft(model: Any, factors: Factors) -> Any:
    rank = next(iter(factors.A.values())).shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=factors.scale * rank, target_modules=list(factors.A))
    wrapped = peft.get_peft_model(model, config)
    for m in factors.A:
        layer = wrapped.base_model.model.get_submodule(m)
        assert type(layer).__module__ == "peft.tuners.lora." + ("bnb" if quantised.bits(model) else "layer")
        layer.lora_A["default"].weight.data = factors.A[m].to(layer.lora_A["default"].weight.dtype, copy=True)
        layer.lora_B["default"].weight.data = factors.B[m].to(layer.lora_B["default"].weight.dtype, copy=True)
    return wrapped


def losses(model: Any, data: Encoded) -> torch.Tensor:
    """Of each text alone, (n,)."""
    found = []
    for ids in data.inputs:
        tokens = torch.from_numpy(ids.astype(np.int64))
        logits = at_least_fp32(model(input_ids=tokens[None], use_cache=False).logits[0])
        found.append(cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
    return torch.stack(found)


def grads(wrapped: Any, modules: Sequence[str], role: str) -> dict[str, torch.Tensor]:
    return {m: getattr(wrapped.base_model.model.get_submodule(m), f"lora_{role}")["default"].weight.grad for m in modules}


def assert_near(got: torch.Tensor, wanted: torch.Tensor, near: float) -> None:
    assert float((got - wanted).abs().max()) <= near * float(wanted.abs().max()) + 1e-9


@pytest.mark.parametrize("bits", BITS)
def test_two_clients_in_one_packed_step_learn_what_each_learns_under_peft_text_by_text(bits: str, folder: Path) -> None:
    trainer = make(loaded(folder, bits))
    data = [examples(4, 1), examples(3, 2)]
    before = [adapter(trainer, 5), adapter(trainer, 6, rank=2)]
    asks = [Train({"shared": each}, AB, epochs=1) for each in before]
    jobs = deque(Job(ask, own, 7, {}) for ask, own in zip(asks, data, strict=True))
    outcomes = {id(job.ask): outcome.trained for job, outcome in trainer.train(jobs)}
    for ask, own, start in zip(asks, data, before, strict=True):
        wrapped = under_peft(exact(folder, bits), start)
        mean = losses(wrapped, own).sum() / own.targets.sum()
        mean.backward()
        trained = outcomes[id(ask)]
        assert trained.loss == pytest.approx(mean.item(), rel=NEAR)
        for role in ("A", "B"):
            wanted = grads(wrapped, list(start.A), role)
            for m, was in start.role(role).items():
                assert_near(was - trained.slots["shared"].role(role)[m], wanted[m], NEAR)


@pytest.mark.parametrize("bits", BITS)
def test_scores_are_those_of_each_text_alone_in_bf16_too(bits: str, folder: Path) -> None:
    for dtype, near in ((torch.float32, NEAR), (torch.bfloat16, 0.03)):
        trainer, data = make(loaded(folder, bits, dtype), dtype), examples(9, 3)
        start = adapter(trainer, 8)
        (outputs,) = trainer.outputs([ScoreJob(Model({"shared": start}), {}, data)])
        with torch.no_grad():
            wanted = losses(under_peft(plain(folder, bits, dtype), start), data)
        np.testing.assert_allclose(outputs[:, 0], wanted.numpy(), rtol=near)
        assert (trainer.base.model.model.norm.weight.dtype, trainer.base.model.dtype) == (dtype, dtype)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_loaded_is_what_transformers_loads_and_casting_leaves_the_packed_weights(bits: str, folder: Path) -> None:
    wanted, own = plain(folder, bits), loaded(folder, bits)
    assert quantised.bits(own.model) == bits and quantised.bits(plain(folder, None)) is None
    state = {name: x.clone() for name, x in wanted.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float32):
        cast(own.model, dtype, CPU)
        assert own.model.model.norm.weight.dtype is dtype
    for name, x in own.model.state_dict().items():
        assert torch.equal(x, state[name]) or "norm" in name or "embed" in name or "lm_head" in name, name
    assert own.source == str(folder) and own.head == () and not any(p.requires_grad for p in own.model.parameters())


def test_weights_are_told_by_what_they_stand_for(folder: Path) -> None:
    """4 bits by hand: codes of NF4 times the scale of their block of 64; 8 bits: codes times the scale of their row over 127."""
    name = "model.layers.0.mlp.down_proj"
    weight = plain(folder, None).get_submodule(name).weight.detach()
    for bits in BITS:
        trainer = make(loaded(folder, bits))
        assert trainer.shapes[name] == (64, 128) == layer_shape(trainer.base.adapted.modules[name])
        assert f"{name}.weight" not in trainer.params and "model.norm.weight" in trainer.params
        layer = plain(folder, bits).get_submodule(name)
        if bits == "4bit":
            state, packed = layer.weight.quant_state, layer.weight.data.flatten()
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
            scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
            wanted = (state.code[codes] * (scales + state.offset).repeat_interleave(64)).view(64, 128)
        else:
            wanted = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
        torch.testing.assert_close(trainer.base_weight(name), wanted, atol=1e-6, rtol=1e-5)
        assert float((wanted - weight).norm() / weight.norm()) < {"4bit": 0.12, "8bit": 0.01}[bits]
        assert sum(map(quantised.count, trainer.base.model.parameters())) == sum(
            p.numel() for p in plain(folder, None).parameters()
        )


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_that_is_quantised_already(bits: str, folder: Path, tmp_path: Path) -> None:
    plain(folder, bits).save_pretrained(tmp_path / "packed")
    architectures.chat_tokenizer().save_pretrained(tmp_path / "packed")
    ids = torch.arange(5, 25)[None]
    for wanted in (None, bits):
        own = loaded(tmp_path / "packed", wanted)
        with torch.no_grad():
            assert_near(own.model(input_ids=ids).logits, plain(folder, bits)(input_ids=ids).logits, NEAR)
    with pytest.raises(BadInput, match=f"is in {bits} already; leave model.quantise out"):
        loaded(tmp_path / "packed", next(each for each in BITS if each != bits))
    full = quantised.dequantised(own.model)
    assert quantised.bits(full) is None and all(p.dtype is torch.float32 for p in full.parameters())
    name = "model.layers.1.self_attn.q_proj"
    torch.testing.assert_close(full.get_submodule(name).weight, quantised.weight(plain(folder, bits).get_submodule(name)))


@pytest.mark.parametrize("bits", BITS)
def test_gpt2_whose_layers_are_stored_the_other_way_round(bits: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "gpt2", "gpt2/wide")
    own = loaded(folder, bits)
    trainer, data = make(own), examples(5, 3)
    start = adapter(trainer, 8)
    (outputs,) = trainer.outputs([ScoreJob(Model({"shared": start}), {}, data)])
    with torch.no_grad():
        wanted = losses(under_peft(plain(folder, bits), start), data)
    np.testing.assert_allclose(outputs[:, 0], wanted.numpy(), rtol=NEAR)
    weight = plain(folder, None).transformer.h[0].attn.c_attn.weight.detach()  # (64, 192)
    got = trainer.base_weight("transformer.h.0.attn.c_attn")
    assert got.shape == (192, 64) and float((got - weight.mT).norm() / weight.norm()) < 0.12


@pytest.mark.parametrize("bits", BITS)
def test_a_model_at_hand_is_quantised_and_not_changed(bits: str, folder: Path) -> None:
    model, tokenizer = plain(folder, None), architectures.chat_tokenizer()
    own = language.load(ModelConfig(source="given:", quantise=bits), 0, Given(model, tokenizer))
    assert quantised.bits(model) is None and quantised.bits(own.model) == bits
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert_near(own.model(input_ids=ids).logits, plain(folder, bits)(input_ids=ids).logits, NEAR)
    packed = Given(plain(folder, bits), tokenizer)
    assert packed.source.startswith("given:llama:")
    with pytest.raises(BadInput, match=rf"this model is quantised \({bits}\); give it unquantised"):
        language.load(ModelConfig(source=packed.source), 0, packed)


@pytest.mark.parametrize("bits", BITS)
def test_peft_holds_an_adapter_on_such_layers(bits: str, folder: Path) -> None:
    """And the layers are what they were after that, with the way in which they multiply."""
    own, ids = loaded(folder, bits), torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = own.model(input_ids=ids).logits
    targets = find_targets(own.model, "all-linear")
    form = try_model(own.model, targets, 64, len(own.processor), (), 1, tokens=True).form
    before = {name: x.clone() for name, x in own.model.state_dict().items()}
    rehearse(own, targets, form)
    after = own.model.state_dict()
    assert set(before) == set(after) and all(torch.equal(x, after[name]) for name, x in before.items())
    own.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(own.model(input_ids=ids).logits, logits)


@pytest.mark.parametrize("bits", BITS)
def test_no_row_depends_on_another(bits: str, folder: Path) -> None:
    """bitsandbytes' own layers in 8 bits let tokens see those after them, some of whose numbers here are large."""
    own, ids = loaded(folder, bits), torch.randint(4, 270, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_near(own.model(input_ids=ids[:, :12]).logits, own.model(input_ids=ids).logits[:, :12], NEAR)


def test_narrow_layers(tmp_path: Path) -> None:
    """As many widths as there are kinds of layers: 64 for all but the last of the feed-forward part."""
    folder = saved(tmp_path / "narrow", "llama/wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    (folder / "model.safetensors").unlink()  # it is said before anything is read
    with pytest.raises(BadInput, match=r"model.layers.0.mlp.down_proj is 96 wide, and quantised layers must be a multiple of 64"):
        loaded(folder, "4bit")


def test_another_way_of_quantising(tmp_path: Path) -> None:
    folder = saved(tmp_path / "gptq", "llama/wide", quantization_config={"quant_method": "gptq", "bits": 4})
    for wanted in (None, "4bit"):
        with pytest.raises(BadInput, match="quantised by gptq; only unquantised ones and those of bitsandbytes"):
            loaded(folder, wanted)


def test_the_package_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(
        BadInput, match=r"not installed: bitsandbytes, which model.quantise = '4bit' asks for; pip install 'fedlora\[quant\]'"
    ):
        loaded(folder, "4bit")
    assert quantised.bits(loaded(folder, None).model) is None


def test_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model.quantise = '8bit': only language models"):
        load.load(ModelConfig(source=str(tiny.save_model("bert", tmp_path / "tiny")), quantise="8bit"), 0, num_labels=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu_to_it_and_back(bits: str, folder: Path) -> None:
    """Loaded, moved there, used, moved back, used, and there again, as a run does: logits as plain transformers has them there, but
    that of 8 bits it rounds inputs, too."""
    near = 0.03 if bits == "4bit" else 0.1
    own, ids = loaded(folder, bits, torch.bfloat16), torch.arange(5, 25)[None]
    there = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="cuda",
        quantization_config=plain(folder, bits, torch.bfloat16).config.quantization_config,
    ).eval()
    with torch.no_grad():
        wanted = there(input_ids=ids.cuda()).logits
        for _ in range(2):
            quantised.move(own.model, torch.device("cuda"))
            assert_near(own.model(input_ids=ids.cuda()).logits, wanted, near)
            quantised.move(own.model, CPU)
            assert_near(own.model(input_ids=ids).logits, wanted.cpu(), near + 0.02)
    trainer = make(own, torch.bfloat16, torch.device("cuda"))
    start, data = adapter(trainer, 8), examples(9, 3)
    (_, outcome), *_ = trainer.train(deque([Job(Train({"shared": start}, AB, epochs=1), data, 7, {})]))
    assert all(x.abs().max() > 0 for x in outcome.trained.slots["shared"].B.values())
