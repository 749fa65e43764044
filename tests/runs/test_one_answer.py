"""Adapter, merged model and predict give one answer, whatever the tokenizer does; texts that are odd have one, too.

The measure is plain transformers and PEFT on one text alone, and in a padded batch as the model card says.
"""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.runs.export import export
from fedlora.runs.play import execute
from fedlora.runs.predict import predict
from fedlora.tasks.texts import encode

SLOW = pytest.mark.slow
TEXTS = ["w1 w2 apple", "w4", "w5 banana w6 w7 w8"]


def tokenizer(template: str, pad: str | None) -> Any:
    words = tiny.tokenizer()
    special = [(token, i) for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]")) if token in template]
    words.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    words.cls_token = words.sep_token = None
    words.bos_token, words.eos_token, words.pad_token = "[CLS]", "[SEP]", pad
    return words


def run(folder: Path, kind: str, words: Any, texts: list[str], **changes: Any) -> Path:
    """One round of FedIT on a tiny model in `folder`; returns the run's folder."""
    config = tiny.config(kind)
    for key, value in {"bos_token_id": 2, "eos_token_id": 3, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    lines = [f'"{text}",{tiny.CLASSES[i % 3]}' for i, text in enumerate(texts * 4)]
    (folder / "d.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    tables = {
        "precision": "fp32",
        "method": {"name": "fedit"},
        "model": {"source": str(folder / "base")},
        "data": {"source": str(folder / "d.csv"), "alpha": 9.0},
        "clients": {"count": 2, "rank": 2},
        "train": {"rounds": 1, "lr": 0.05, "batch_size": 8},
    }
    execute(resolve(tables), folder / "run", False, tiny.Silent())
    return folder / "run"


def plain(model: Any, words: Any, texts: list[str], together: bool) -> np.ndarray:
    """Probabilities by plain transformers, (texts, classes)."""
    batches = [texts] if together else [[text] for text in texts]
    with torch.no_grad():
        found = [model.eval()(**words(batch, padding=together, return_tensors="pt")).logits for batch in batches]
    return torch.cat(found).softmax(1).numpy()


@pytest.mark.parametrize("template", ["$A", "$A [SEP]", *(pytest.param(x, marks=SLOW) for x in ("[CLS] $A", "[CLS] $A [SEP]"))])
@pytest.mark.parametrize("own_pad", [None, "[SEP]", pytest.param("[PAD]", marks=SLOW)])
@pytest.mark.parametrize("named", [None, 3, pytest.param(0, marks=SLOW)])
def test_every_tokenizer_of_a_decoder(template: str, own_pad: str | None, named: int | None, tmp_path: Path) -> None:
    """The base names no padding token, [PAD] or [SEP]; the tokenizer has none or one; texts end with [SEP] or not."""
    out = run(tmp_path, "llama", tokenizer(template, own_pad), TEXTS, pad_token_id=named)
    said = [answer["probability"] for answer in predict(out, TEXTS)]
    export(out, tmp_path / "model", None, merged=True)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapter = peft.PeftModel.from_pretrained(base, out / "adapter")
    for model in (merged, adapter):
        np.testing.assert_allclose(plain(model, words, TEXTS, False).max(1), said, atol=1e-5)
    base.config.pad_token_id = words.pad_token_id  # as the card says
    for model in (merged, adapter):
        np.testing.assert_allclose(plain(model, words, TEXTS, True).max(1), said, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "template"), [("bert", "[CLS] $A [SEP]"), ("roberta", "[CLS] $A [SEP]"), ("gpt2", "$A"), ("llama", "$A [SEP]")]
)
def test_odd_texts_have_an_answer_that_depends_on_no_other(kind: str, template: str, tmp_path: Path) -> None:
    """Nothing, blanks, special tokens written inside, unknown words, longer than there are positions: a label for each."""
    odd = ["", "   ", "w1 [SEP] w2", "[PAD] w1", "w1 [PAD]", "[CLS]", "zebra", "w1 " * 300]
    out = run(tmp_path, kind, tokenizer(template, "[PAD]"), [*odd, *TEXTS])
    notes: list[str] = []
    together = predict(out, [*odd, *TEXTS], notes.append)
    assert notes == ["1 of 11 texts is longer than 64 tokens, and cut"]
    assert len(together) == len(odd) + len(TEXTS)
    for text, answer in zip([*odd, *TEXTS], together, strict=True):
        (alone,) = predict(out, [text])
        assert alone["label"] == answer["label"] and alone["probability"] == pytest.approx(answer["probability"], abs=1e-5), text
    words = transformers.AutoTokenizer.from_pretrained(out / "adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapter = peft.PeftModel.from_pretrained(base, out / "adapter")
    some = [text for text in odd[2:7] if words(text)["input_ids"]]
    wanted = [answer["probability"] for text, answer in zip([*odd, *TEXTS], together, strict=True) if text in some]
    np.testing.assert_allclose(plain(adapter, words, some, False).max(1), wanted, atol=1e-5)


def test_texts_that_are_cut_are_counted(tmp_path: Path) -> None:
    listener = tiny.Silent()
    tiny.save_model("bert", tmp_path / "base")
    lines = [f"w1 {'w2 ' * (70 if i < 5 else 3)},{tiny.CLASSES[i % 3]}" for i in range(20)]
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    tables = {"model": {"source": str(tmp_path / "base")}, "data": {"source": str(tmp_path), "alpha": 9.0}, "train": {"rounds": 1}}
    execute(resolve(tables, {"clients": {"count": 2, "rank": 2}}), tmp_path / "run", False, listener)
    assert "5 of 20 training texts are longer than 64 tokens, and cut" in listener.notes
    assert "data.max_length = 128 is above the 64 tokens that the tokenizer allows; using 64" in listener.notes


def test_texts_in_which_a_tokenizer_finds_nothing_are_counted() -> None:
    """Of three texts one is empty, one has one unknown word, one a known and an unknown one: 3 of 4 are nothing or unknown."""
    words = tokenizer("$A", "[PAD]")
    labels = np.zeros(3, dtype=np.int64)
    assert encode(words, ["", "zebra", "w1 okapi"], labels, 9).unknown == 3 / 4
    assert encode(words, ["", "", ""], labels, 9).unknown == 1.0
    assert encode(tokenizer("[CLS] $A [SEP]", "[PAD]"), ["", "", "w1 w2"], labels, 9).unknown == 2 / 4


@pytest.mark.parametrize(
    ("changes", "says"), [({"max_length": 2}, "the tokenizer adds 2 tokens"), ({}, "100 % of the training texts")]
)
def test_texts_that_tell_nothing_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    tiny.save_model("bert", tmp_path / "base")
    (tmp_path / "d.csv").write_text("text,label\n" + "zebra quagga,a\nokapi,b\n" * 20)
    tables = {"model": {"source": str(tmp_path / "base")}, "data": {"source": str(tmp_path / "d.csv"), **changes}}
    with pytest.raises(BadInput, match=says):
        execute(resolve(tables, {"clients": {"count": 2, "rank": 2}}), tmp_path / "run", False, tiny.Silent())
    assert not (tmp_path / "run").exists()
