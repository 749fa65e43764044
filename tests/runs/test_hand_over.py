"""Exported language models, read by plain transformers and PEFT: factors, merged weights, tied heads, templates, cards."""

import json
import math
from pathlib import Path
from typing import Any

import architectures
import ggufs
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from fedlora import api
from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.models import gguf
from fedlora.models import peft as ours
from fedlora.models.load import Given
from fedlora.runs.export import export, read_result
from fedlora.runs.play import execute
from fedlora.runs.prepare import load_pretrained
from fedlora.tasks import defaults

GENERATION = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats."""
    folder = tmp_path_factory.mktemp("chats")
    for part, count in (("train", 24), ("test", 6)):
        lines = []
        for i in range(count):
            said = [{"role": "user", "content": f"{i} and {i + 1}?"}, {"role": "assistant", "content": f"the {2 * i + 1}"}]
            lines.append(json.dumps({"messages": said}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def save_base(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    model, tokenizer = architectures.causal(name)
    model.generation_config = transformers.GenerationConfig(**GENERATION, eos_token_id=[3, 1])
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def play(base: Path, data: Path, out: Path, *layers: dict[str, Any]) -> dict[str, Any]:
    common: dict[str, Any] = {
        "precision": "fp32",
        "task": {"name": "causal_lm"},
        "method": {"name": "fedit"},
        "model": {"source": str(base)},
        "data": {"source": str(data), "partition": "iid", "max_length": 64},
        "clients": {"rank": 2, "count": 3},
        "train": {"rounds": 2, "lr": 0.02, "batch_size": 8},
    }
    return execute(resolve(defaults(common), common, *layers), out, False, tiny.Silent())


@pytest.fixture(scope="module")
def stacked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, in bf16, and `run`: FLoRA, whose stacks are of more ranks than keys and values have outputs."""
    place = tmp_path_factory.mktemp("stacked")
    save_base(place / "base", "llama", torch.bfloat16)
    few = {"clients": {"rank": [1, 2], "count": 2}, "train": {"rounds": 3}}
    assert play(place / "base", data, place / "run", {"method": {"name": "flora"}}, few)["result"] == "adapter"
    return place


def bases(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change(folder: Path) -> dict[str, np.ndarray]:
    """Module -> what an adapter's file adds to its weight, by LoRA's definition, in float64."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in (n for n in tensors if n.endswith("lora_A.weight")):
        m = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        scale = config.get("alpha_pattern", {}).get(m, config["lora_alpha"]) / config.get("rank_pattern", {}).get(m, config["r"])
        found[m] = scale * tensors[name.replace("lora_A", "lora_B")].double().numpy() @ tensors[name].double().numpy()
    return found


def test_a_stack_has_ranks_and_scales_of_its_own_in_each_module(stacked: Path) -> None:
    """9 ranks in three rounds of 1 + 2; keys and values have 8 outputs. Nothing is lost, and no tensor is zero."""
    folder = stacked / "run" / "adapter"
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    narrow = {f"model.layers.{i}.self_attn.{x}_proj": 8 for i in (0, 1) for x in "kv"}
    assert (config["r"], config["lora_alpha"]) == (9, 9)
    assert config["rank_pattern"] == config["alpha_pattern"] == narrow
    assert len(tensors) == 28 and all(x.any() for x in tensors.values())
    _, _, result, _ = read_result(stacked / "run")
    dense = dict.fromkeys(change(folder), 0.0)
    for f in (*result.slots.values(), *result.base.pairs):
        dense = {m: W + f.scale * f.B[m].double().numpy() @ f.A[m].double().numpy() for m, W in dense.items()}
    for m, W in change(folder).items():
        np.testing.assert_allclose(W, dense[m], atol=1e-6)


def test_a_model_is_merged_in_fp32_whatever_its_base_is_in(stacked: Path, tmp_path: Path) -> None:
    export(stacked / "run", tmp_path / "merged", None, merged=True)
    whole, base = bases(tmp_path / "merged"), bases(stacked / "base")
    assert whole.keys() == base.keys() and {x.dtype for x in whole.values()} == {torch.float32}
    changes = change(stacked / "run" / "adapter")
    for name, W in whole.items():
        expected = base[name].double().numpy() + changes.get(name.removesuffix(".weight"), 0.0)
        np.testing.assert_allclose(W.double().numpy(), expected, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(W, W.bfloat16().float()) for W in whole.values())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32


def test_generation_config_tokenizer_and_chat_template_go_along(stacked: Path, tmp_path: Path) -> None:
    export(stacked / "run", tmp_path / "merged", None, merged=True)
    own = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert own | GENERATION | {"eos_token_id": [3, 1]} == own
    for folder in (tmp_path / "merged", stacked / "run" / "adapter"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == architectures.CHATML
        assert tokenizer.get_vocab() == architectures.chat_tokenizer().get_vocab()


def follow(folder: Path, monkeypatch: Any, capsys: Any) -> str:
    """What the lines of a card print, as they stand there."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    return str(capsys.readouterr().out)


def test_the_lines_of_a_chat_models_card(stacked: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """As `fedlora predict` answers the same question."""
    export(stacked / "run", tmp_path / "merged", None, merged=True)
    said = [follow(folder, monkeypatch, capsys) for folder in (stacked / "run" / "adapter", tmp_path / "merged")]
    assert said[0] == said[1] != "\n"
    (answer,) = api.load(stacked / "run").predict(["a question"])
    assert said[0].strip().startswith(answer["answer"][:20])


def test_a_large_model_is_written_in_shards(stacked: Path, tmp_path: Path) -> None:
    config, roster, result, _ = read_result(stacked / "run")
    pretrained = load_pretrained(config, roster.schema)
    ours.save_model(pretrained, result, tmp_path / "one")
    ours.save_model(pretrained, result, tmp_path / "many", shard="20KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    files = set(index.values())
    assert len(files) > 2 and not (tmp_path / "many" / "model.safetensors").exists()
    one = bases(tmp_path / "one")
    assert index.keys() == one.keys()
    many = {name: x for file in files for name, x in load_file(tmp_path / "many" / file).items()}
    assert all(torch.equal(many[name], x) for name, x in one.items())
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert all(torch.equal(p, one[name]) for name, p in read.named_parameters())


def test_an_adapter_that_is_cut_says_what_it_lost(stacked: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    fedlora = tiny.console(monkeypatch, capsys, tmp_path)
    status, out, err = fedlora("export", stacked / "run", "--to", "cut", "--rank", 4)
    assert status == 0 and err == ""
    before, after = change(stacked / "run" / "adapter"), change(tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 4
    for m, W in before.items():
        U, S, Vt = np.linalg.svd(W)
        np.testing.assert_allclose(after[m], (U[:, :4] * S[:4]) @ Vt[:4], atol=1e-6)
    lost = {m: np.linalg.norm(before[m] - after[m]) for m in before}
    whole = math.sqrt(sum(x**2 for x in lost.values()) / sum(np.linalg.norm(W) ** 2 for W in before.values()))
    shares = {m: lost[m] / np.linalg.norm(before[m]) for m in before}
    worst = max(shares, key=shares.get)
    assert out.splitlines() == [
        f"cut to rank 4: relative error {100 * whole:.2g} % (Frobenius norm, all modules), {100 * shares[worst]:.2g} % in {worst}",
        "adapter in cut",
    ]
    facts = json.loads((tmp_path / "cut" / "fedlora.json").read_text())["cut"]
    assert (facts["rank"], facts["worst"]) == (4, worst)
    assert facts["error"] == pytest.approx(whole, rel=1e-4) and facts["worst_error"] == pytest.approx(shares[worst], rel=1e-4)
    assert out.splitlines()[0] in (tmp_path / "cut" / "README.md").read_text()
    assert "cut" not in json.loads((stacked / "run" / "adapter" / "fedlora.json").read_text())
    peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 0}, "--rank 0: an adapter has a rank of at least 1"),
        ({"rank": 2, "merged": True}, "--rank 2 with --merged: a whole model has no rank"),
    ],
)
def test_what_cannot_be_cut(asked: dict[str, Any], said: str, stacked: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        export(stacked / "run", tmp_path / "to", None, **({"merged": False} | asked))
    assert not (tmp_path / "to").exists()


def logits(model: Any, text: str = "1 and 2? the 3") -> np.ndarray:
    ids = torch.tensor(architectures.chat_tokenizer()(text)["input_ids"])[None]
    with torch.no_grad():
        found: np.ndarray = model.eval()(input_ids=ids).logits[0].double().numpy()
    return found


def test_a_tied_head_stays_tied_after_full_fine_tuning(data: Path, tmp_path: Path) -> None:
    """transformers would untie a head that is written beside an embedding, and answer with the head of the base."""
    base = save_base(tmp_path / "base", "llama/tied")
    assert play(base, data, tmp_path / "run", {"method": {"name": "fedavg"}})["result"] == "model"
    _, _, result, _ = read_result(tmp_path / "run")
    written, before = bases(tmp_path / "run" / "model"), bases(base)
    assert written.keys() == before.keys() and "lm_head.weight" not in written
    for name, x in written.items():
        torch.testing.assert_close(x, before[name] + result.full[name])
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert not torch.equal(read.lm_head.weight, before["model.embed_tokens.weight"])
    by_hand = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, p in by_hand.named_parameters():
            p += result.full[name]
    np.testing.assert_allclose(logits(read), logits(by_hand), atol=1e-6)
    with pytest.raises(BadInput, match=r"--rank 2: .* trained the weights themselves"):
        export(tmp_path / "run", tmp_path / "to", None, False, rank=2)


def test_gpt2s_weights_lie_the_other_way_round(data: Path, tmp_path: Path) -> None:
    """Its Conv1D holds (d_in, d_out): W' = W + (BA)^T; and its head is tied, which no adapter touches."""
    base = save_base(tmp_path / "base", "gpt2")
    play(base, data, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    export(tmp_path / "run", tmp_path / "merged", None, merged=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    whole, before, changes = bases(tmp_path / "merged"), bases(base), change(adapter)
    assert whole.keys() == before.keys() and len(changes) == 8
    for name, W in whole.items():
        by = changes.get(name.removesuffix(".weight"))
        expected = before[name].double().numpy() + (0.0 if by is None else by.T)
        np.testing.assert_allclose(W.double().numpy(), expected, rtol=1e-6, atol=1e-6)
    under_peft = logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapter))
    np.testing.assert_allclose(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), under_peft, atol=1e-5
    )
    assert np.abs(under_peft - logits(transformers.AutoModelForCausalLM.from_pretrained(base))).max() > 1e-2


def test_an_adapter_on_a_gguf_file_names_the_file_and_its_card_loads_it(
    data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Never the cache that it was converted into, which others do not have and which may go."""
    monkeypatch.setenv(gguf.CACHE, str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    file = ggufs.write_llama(*architectures.causal("llama"), tmp_path / "models" / "tiny.gguf")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for part in ("train", "test"):
        (prompts / f"{part}.jsonl").write_text('{"prompt": "1 and 2?", "completion": " 3"}\n' * 8)
    play(file, prompts, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    for name in ("adapter_config.json", "fedlora.json"):
        assert str(file.resolve()) in (adapter / name).read_text()
    card = (adapter / "README.md").read_text()
    assert str(tmp_path) not in card and "base_model:" not in card and "where your tiny.gguf is" in card
    assert not [x for x in adapter.iterdir() if x.suffix != ".safetensors" and str(tmp_path / "cache") in x.read_text()]
    said = follow(adapter, monkeypatch, capsys)
    export(tmp_path / "run", tmp_path / "merged", None, merged=True)
    assert said == follow(tmp_path / "merged", monkeypatch, capsys)


def test_a_model_that_is_at_hand_keeps_its_generation_config(data: Path) -> None:
    from fedlora.config import ModelConfig
    from fedlora.models import language

    model, tokenizer = architectures.causal("llama")
    model.generation_config = transformers.GenerationConfig(**GENERATION)
    given = Given(model, tokenizer)
    found = language.load(ModelConfig(source=given.source), 0, given).model.generation_config
    assert found.to_dict() == model.generation_config.to_dict() and found is not model.generation_config
