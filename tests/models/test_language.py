"""Loading causal language models."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from architectures import CAUSAL, causal
from safetensors.torch import load_file, save_file

from fedlora.config import HeadMode, ModelConfig
from fedlora.errors import BadInput
from fedlora.models import language
from fedlora.models.load import Given, Pretrained

TEXT = "the 12 apples and 345 pears"


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model and its tokenizer."""
    model, words = causal(name)
    model.to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def load(source: object, given: Given | None = None, dtype: torch.dtype | None = None) -> Pretrained:
    return language.load(ModelConfig(source=str(source)), 0, given, dtype)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer(TEXT, return_tensors="pt")).logits
    return found


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_loaded_is_the_checkpoint(name: str, tmp_path: Path) -> None:
    own = load(saved(tmp_path, name))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(own.model, own.processor), logits(plain, own.processor))
    assert not any(p.requires_grad for p in own.model.parameters()) and not own.model.training
    assert (own.head, own.drawn, own.keeps_head, own.peft_task) == ((), (), True, "CAUSAL_LM")
    assert (own.source, own.notes) == (str(tmp_path), ())
    alike = {n: p.shape for n, p in own.model.named_parameters()}
    outline = language.outline(ModelConfig(source=str(tmp_path)))
    assert {n: p.shape for n, p in outline.model.named_parameters()} == alike
    assert outline.keeps_head and next(outline.model.parameters()).is_meta


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("has", "asked", "gets"),
    [(BF16, BF16, BF16), (BF16, None, FP32), (BF16, FP32, FP32), (FP32, BF16, BF16), (FP16, BF16, BF16), (FP16, None, FP32)],
)
@pytest.mark.parametrize("at_hand", [False, True])
def test_only_what_is_bf16_stays_bf16(
    has: torch.dtype, asked: torch.dtype | None, gets: torch.dtype, at_hand: bool, tmp_path: Path
) -> None:
    folder = saved(tmp_path, "llama/tied", has)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=has)
    given = Given(plain, causal("llama/tied")[1]) if at_hand else None
    own = load(folder, given, asked).model
    for name, p in plain.named_parameters():
        assert own.get_parameter(name).dtype is gets and torch.equal(own.get_parameter(name), p.to(gets))
    assert own.lm_head.weight is own.model.embed_tokens.weight


def test_a_model_at_hand_is_read_and_not_changed() -> None:
    model, words = causal("qwen3")
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    own = load("given:", Given(model, words))
    assert torch.equal(logits(own.model, own.processor), logits(model.eval(), words))
    with torch.no_grad():
        own.model.lm_head.weight.zero_()
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_a_padding_token_is_found_and_one_that_ends_texts_may_stay(tmp_path: Path) -> None:
    words = causal("llama")[1]
    saved(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 3}))  # the end of a turn, as SmolLM2's
    own = load(tmp_path)
    assert own.processor.pad_token_id == own.model.config.pad_token_id == own.processor.eos_token_id == 3
    words.pad_token = None
    words.save_pretrained(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": None}))
    own = load(tmp_path)
    assert own.processor.pad_token_id == own.model.config.pad_token_id == own.processor.eos_token_id


# ---- bad input -----------------------------------------------------------------------------------------------------------------


def refused(source: object, given: Given | None = None) -> str:
    with pytest.raises(BadInput) as error:
        load(source, given)
    assert "\n" not in str(error.value)
    return str(error.value)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_an_encoder(tmp_path: Path) -> None:
    """transformers makes a language model of a BERT without a word, and none at all of a DistilBERT."""
    assert "an encoder; a decoder such as" in refused(save(transformers.BertForMaskedLM(tiny.config("bert")), tmp_path / "bert"))
    assert "an encoder; a decoder such as" in refused(save(transformers.BertModel(tiny.config("bert")), tmp_path / "body"))
    other = save(transformers.DistilBertModel(tiny.config("distilbert")), tmp_path / "distilbert")
    assert "transformers makes no language model of a distilbert" in refused(other)
    with pytest.raises(BadInput, match="no language model of a distilbert"):
        language.outline(ModelConfig(source=str(other)))


def test_a_bert_that_was_made_a_decoder_is_one(tmp_path: Path) -> None:
    config = tiny.config("bert")
    config.is_decoder = True
    own = load(save(transformers.BertLMHeadModel(config), tmp_path))
    assert type(own.model).__name__ == "BertLMHeadModel"


def test_an_encoder_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=40, num_layers=1, num_heads=2)
    config.save_pretrained(tmp_path)
    assert "t5 is an encoder-decoder; a decoder such as" in refused(tmp_path)


def test_a_classifier_or_a_body_has_no_language_models_head(tmp_path: Path) -> None:
    own = save(transformers.LlamaForSequenceClassification(tiny.config("llama")), tmp_path / "classifier")
    assert "lacks a language model's head (lm_head.weight); it is one of a LlamaForSequenceClassification" in refused(own)
    body = transformers.LlamaModel(tiny.config("llama"))
    assert "lacks a language model's head" in refused(save(body, tmp_path / "body"))
    assert "lacks a language model's head" in refused("given:", Given(body, tiny.tokenizer()))


def test_a_checkpoint_that_is_not_whole_or_does_not_fit(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    weights = load_file(file)
    save_file({n: x for n, x in weights.items() if "layers.1.mlp" not in n}, file, {"format": "pt"})
    assert "lacks 3 of the model's 21 weights, model.layers.1.mlp" in refused(tmp_path)
    save_file(weights | {"model.norm.weight": torch.ones(17)}, file, {"format": "pt"})
    assert "model.norm.weight is (17,) in the checkpoint and (16,) by config.json" in refused(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    model, words = causal("llama")
    words.add_tokens([f"more{i}" for i in range(20)])
    saved(tmp_path)
    words.save_pretrained(tmp_path)
    assert "ids up to 289, and the model has 280 rows" in refused(tmp_path)
    assert "ids up to 289, and the model has 280 rows" in refused("given:", Given(model, words))


def test_no_tokenizer(tmp_path: Path) -> None:
    saved(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert "model.source" in refused(tmp_path)


@pytest.mark.parametrize("head", [HeadMode.SHARED, HeadMode.PERSONAL])
def test_a_head_that_is_to_be_trained(head: HeadMode, tmp_path: Path) -> None:
    config = ModelConfig(source=str(tmp_path), head=head)
    with pytest.raises(BadInput, match=f"model.head = '{head.value}': a language model keeps its own head"):
        language.load(config, 0)


def test_no_such_model() -> None:
    assert "did you mean smollm2" in refused("smolm2")
    assert "nobody/nothing" in refused("nobody/nothing")
