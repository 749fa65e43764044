"""Clients with transformers' Trainer learn what plain PyTorch under PEFT learns."""

from pathlib import Path
from typing import Any

import hf_clients as tiny_lm
import peft
import pytest
import torch
import transformers
from hf_clients import SCALE, SIZES, adapted, averaged, factors, loss_of, merged, rows, start, trainer

import fedlora
from fedlora import BadInput, seeds

DATA = [rows(n, seed) for seed, n in enumerate(SIZES)]
TESTS = [rows(5, 10), rows(9, 11)]


def clients(place: Path, kind: str = "llama", evaluated: bool = True, **changes: Any) -> list[Any]:
    made = [
        trainer(data, place / str(i), adapted(kind), TESTS[i] if evaluated else None, **changes) for i, data in enumerate(DATA)
    ]
    return [fedlora.client(each, name) for each, name in zip(made, ("north", "south"), strict=True)]


def run(place: Path, method: str = "fedit", rounds: int = 2, joining: Any = None, **changes: Any) -> Any:
    known = {"data": clients(place) if joining is None else joining, "method": method, "rounds": rounds, "progress": False}
    return fedlora.run(**{**known, **changes})


def near(one: Any, other: Any, far: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=far, rtol=0)


@pytest.mark.parametrize(("method", "trains"), [("fedit", "AB"), ("ffa-lora", "B")])
def test_a_federation_of_trainers_is_plain_training_and_a_mean_by_hand(method: str, trains: str, tmp_path: Path) -> None:
    joining = clients(tmp_path)
    done = run(tmp_path, method, joining=joining)
    wanted, losses = averaged(DATA, 2, trains)
    if trains == "B":
        wanted |= {key: x for key, x in start().items() if key.startswith("A")}
    assert max(float((wanted[key] - x).abs().max()) for key, x in start().items()) > 1e-2  # it has learned
    for each in joining:  # the result is in every trainer's model
        near(factors(each.hf.trainer.model), wanted)
    assert [row["loss"] for row in done.rows] == pytest.approx(losses, abs=1e-5)
    model = joining[0].hf.trainer.model
    expected = sum(len(part) * loss_of(model, part) for part in TESTS) / sum(map(len, TESTS))
    row = done.rows[-1]
    assert row["eval_loss"] == row["score"] == pytest.approx(expected, abs=1e-5)
    assert (row["clients_scored"], row["examples_scored"], row["metric"]) == (2, 14, "eval_loss") and row["evaluate_bytes"] > 0
    assert done.summary["final"]["eval_loss"] == row["eval_loss"] and "evaluation loss" in str(done)
    done.save_adapter(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_lm.base(), tmp_path / "adapter")
    near(factors(again), wanted)
    assert again.peft_config["default"].lora_alpha == tiny_lm.ALPHA
    assert loss_of(again, TESTS[0]) == pytest.approx(loss_of(model, TESTS[0]), abs=1e-6)
    assert not list(tmp_path.glob("*/checkpoint-*"))  # no round was saved


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merges_go_into_the_base(kind: str, tmp_path: Path) -> None:
    """FLoRA: round 2 trains on what round 1 left; the result is one adapter on the weights that the trainers came with."""
    joining = clients(tmp_path, kind)
    before = {name: p.detach().clone() for name, p in tiny_lm.base(kind).named_parameters()}
    done = run(tmp_path, "flora", joining=joining)

    def begin(k: int, t: int) -> Any:
        own = seeds.derive(0, "flora", k)
        found = {}
        for key, x in start(kind=kind).items():
            if key.startswith("A"):
                bound = x.shape[1] ** -0.5
                x = torch.from_numpy(seeds.generator(own, "fresh", t, key[2:]).uniform(-bound, bound, tuple(x.shape))).float()
            found[key] = x
        return found

    wanted = merged(adapted(kind), DATA, begin, 2)
    assert max(float(x.abs().max()) for x in wanted.values()) > 1e-2
    for each in joining:
        model, own = each.hf.trainer.model, factors(each.hf.trainer.model)
        scaling = {path: m.scaling["default"] for path, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
        near({path: scaling[path] * own[f"B {path}"] @ own[f"A {path}"] for path in wanted}, wanted)
        plain = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in model.named_parameters()}
        assert all(torch.equal(plain[name], p) for name, p in before.items())
    done.save_adapter(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_lm.base(kind), tmp_path / "adapter")
    assert loss_of(again, TESTS[1]) == pytest.approx(loss_of(joining[1].hf.trainer.model, TESTS[1]), abs=1e-5)
    expected = sum(len(part) * loss_of(again, part) for part in TESTS) / sum(map(len, TESTS))
    assert done.rows[-1]["eval_loss"] == pytest.approx(expected, abs=1e-4)
