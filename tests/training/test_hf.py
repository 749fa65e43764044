"""Clients with transformers' Trainer learn what plain PyTorch under PEFT learns."""

from pathlib import Path
from typing import Any

import hf_clients as tiny_lm
import peft
import pytest
import tiny
import torch
import transformers
from hf_clients import SIZES, adapted, averaged, factors, loss_of, merged, rows, start, trainer

import fedlora
from fedlora import BadInput, seeds

DATA = [rows(n, seed) for seed, n in enumerate(SIZES)]
TESTS = [rows(5, 10), rows(9, 11)]


def clients(place: Path, kind: str = "llama", evaluated: bool = True, **changes: Any) -> list[Any]:
    made = [trainer(data, place / str(i), adapted(kind), TESTS[i] if evaluated else None, **changes) for i, data in enumerate(DATA)]
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


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
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
    if kind == "llama":  # of GPT-2, transformers counts a first token that has no loss
        expected = sum(len(part) * loss_of(again, part) for part in TESTS) / sum(map(len, TESTS))
        assert done.rows[-1]["eval_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_ranks_may_differ_and_grow(tmp_path: Path) -> None:
    """FlexLoRA at ranks 2 and 4: the server has rank 4, the trainers keep their own; every model loads in plain PEFT."""
    made = [
        trainer(DATA[0], tmp_path / "0", adapted(r=2, lora_alpha=6)),
        trainer(DATA[1], tmp_path / "1", adapted(r=4, lora_alpha=6)),
    ]
    joining = [fedlora.client(each) for each in made]
    done = run(tmp_path, "flexlora", joining=joining)
    assert [each["clients"] for each in done.rows] == [2, 2] and done.config.clients.rank == [2, 4]
    done.save_adapter(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_lm.base(), tmp_path / "adapter")
    assert loss_of(again, TESTS[0]) == pytest.approx(loss_of(made[0].model, TESTS[0]), abs=1e-5)
    assert loss_of(again, TESTS[0]) != pytest.approx(loss_of(tiny_lm.base(), TESTS[0]), abs=1e-3)
    assert made[0].model.peft_config["default"].r == made[1].model.peft_config["default"].r == 4


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted_and_needs_its_trainers(tmp_path: Path) -> None:
    """With data in a random order and dropout, whose draws are the round's own."""
    shuffled = {"train_sampling_strategy": "random", "num_train_epochs": 2, "data_seed": 3}

    def joining() -> list[Any]:
        return [fedlora.client(trainer(d, tmp_path / str(i), adapted(lora_dropout=0.2), **shuffled)) for i, d in enumerate(DATA)]

    whole, torn = joining(), joining()
    run(tmp_path, "flora", 3, whole, out=tmp_path / "whole")
    run(tmp_path, "flora", 3, torn, out=tmp_path / "torn", on_round=lambda row: row["round"] == 1)
    torn = joining()
    (tmp_path / "torn" / "summary.json").unlink()
    done = run(tmp_path, "flora", 3, torn, out=tmp_path / "torn", resume=True)
    near(factors(torn[0].hf.trainer.model), factors(whole[0].hf.trainer.model), 0.0)
    assert done.rows[-1]["eval_loss"] is None and done.rows[-1]["loss"] > 0
    assert any("eval_dataset" in note for note in done.notes)
    with pytest.raises(BadInput, match=r"^train.trainer = 'given:Trainer': its trainers were given in Python; give them again"):
        fedlora.run(out=tmp_path / "torn", resume=True, rounds=4, progress=False)
    with pytest.raises(BadInput, match="is not possible"):
        done.predict(["a"])
    assert done.report().stat().st_size > 1000


def test_a_round_has_its_own_order_and_leaves_the_arguments_alone(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Watched(list):  # type: ignore[type-arg]
        def __getitem__(self, i: Any) -> Any:
            seen[-1].append(i)
            return super().__getitem__(i)

    class Note(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
            seen.append([])

    how = {"train_sampling_strategy": "random", "data_seed": 5, "save_strategy": "epoch"}
    made = trainer(Watched(DATA[0]), tmp_path, callbacks=[Note()], **how)
    numbers = torch.random.get_rng_state()
    run(tmp_path, rounds=3, joining=[fedlora.client(made, "one")])
    assert all(sorted(each) == list(range(12)) for each in seen) and len({tuple(each) for each in seen}) == 3
    assert torch.equal(numbers, torch.random.get_rng_state())
    assert (made.args.save_strategy, made.args.data_seed, made.args.max_steps) == ("epoch", 5, -1)
    assert not list(tmp_path.glob("checkpoint-*")) and made.state.global_step == 3
    assert all(p.requires_grad == ("lora_" in name) for name, p in made.model.named_parameters())


def test_clients_end_with_their_own_model_where_the_method_is_personal(tmp_path: Path) -> None:
    joining = clients(tmp_path)
    done = run(tmp_path, "fedsa-lora", joining=joining)
    own = [factors(each.hf.trainer.model) for each in joining]
    assert all(torch.equal(own[0][key], own[1][key]) == key.startswith("A") for key in own[0])
    losses = [loss_of(each.hf.trainer.model, part) for each, part in zip(joining, TESTS, strict=True)]
    assert list(done.rows[-1]["client_eval_loss"].values()) == pytest.approx(losses, abs=1e-5)
    done.save_adapter(tmp_path / "south", client="south")
    again = peft.PeftModel.from_pretrained(tiny_lm.base(), tmp_path / "south")
    near(factors(again), own[1], 0.0)
    near(factors(done.model("north")), own[0], 0.0)


@pytest.mark.slow
def test_one_model_serves_several_trainers(tmp_path: Path) -> None:
    model = adapted()
    one = [fedlora.client(trainer(d, tmp_path / str(i), model)) for i, d in enumerate(DATA)]
    two = [fedlora.client(trainer(d, tmp_path / str(i))) for i, d in enumerate(DATA)]
    a, b = (run(tmp_path, "flora", joining=each) for each in (one, two))
    assert [row["loss"] for row in a.rows] == [row["loss"] for row in b.rows]
    near(factors(one[0].hf.trainer.model), factors(two[0].hf.trainer.model), 0.0)


def classifier() -> Any:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "vocab_size": tiny_lm.WORDS,
    }
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3, hidden_dropout_prob=0.0))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["query"], task_type="SEQ_CLS"))


def test_what_peft_saves_whole_trains_and_travels_too(tmp_path: Path) -> None:
    """A classifier's head, averaged by number of examples: sixteen steps of SGD on one batch each, against plain PyTorch."""
    data = [[{"input_ids": row["input_ids"], "labels": sum(row["input_ids"]) % 3} for row in own] for own in DATA]
    how = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0, "learning_rate": 0.5}
    how |= {"per_device_train_batch_size": 16}
    made = [trainer(own, tmp_path / str(i), classifier(), **how) for i, own in enumerate(data)]
    for each in made:
        each.model.get_base_model().bert.config.attention_probs_dropout_prob = 0.0
        for module in each.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    head = "base_model.model.classifier.modules_to_save.default.weight"
    before = dict(made[0].model.named_parameters())[head].detach().clone()
    plain, parts = classifier().eval(), []
    for own in data:
        weight = dict(plain.named_parameters())[head]
        ids, labels = (torch.tensor([row[key] for row in own]) for key in ("input_ids", "labels"))
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(plain(input_ids=ids).logits, labels), weight)
        parts.append(before - 0.5 * grad)
    done = run(tmp_path, rounds=1, joining=[fedlora.client(each) for each in made])
    wanted = sum(len(own) * x for own, x in zip(data, parts, strict=True)) / sum(SIZES)
    for each in made:
        torch.testing.assert_close(dict(each.model.named_parameters())[head], wanted, atol=1e-6, rtol=0)
    assert (wanted - before).abs().max() > 1e-3 and done.config.model.head.value == "shared"


HOSPITALS = """
from pathlib import Path
from hf_clients import SIZES, rows, trainer

def make(name):
    number = int(name.removeprefix("client-"))
    return trainer(rows(SIZES[number], number), Path(name))
"""


@pytest.mark.slow
def test_from_the_command_line_a_function_makes_the_trainers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = tiny.console(monkeypatch, capsys, tmp_path)
    (tmp_path / "hospitals.py").write_text(HOSPITALS)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--method", "fedit", "--clients", 2, "--set", "train.trainer=hospitals:make", "--quiet")
    status, _, err = call("run", *flags, "--rounds", 1, "--out", "run")
    assert status == 0, err
    status, _, err = call("run", "--resume", "--rounds", 2, "--out", "run", "--quiet")
    assert status == 0, err
    assert call("export", "run", "--to", "adapter")[0] == 0
    wanted, _ = averaged(DATA, 2)
    near(factors(peft.PeftModel.from_pretrained(tiny_lm.base(), tmp_path / "adapter")), wanted)
    for words, message in {
        ("predict", "run", "a"): "is not possible",
        ("run", *flags, "--dry-run"): "is not possible",
        ("run", "--set", "train.trainer=hospitals:make"): "train.trainer = 'hospitals:make' needs clients.count",
        ("run", "--clients", 2, "--set", "train.trainer=hospitals"): "a function is named package.module:function",
        (
            "run",
            "--clients",
            3,
            "--set",
            "train.trainer=hospitals:make",
        ): "train.trainer = 'hospitals:make': tuple index out of range",
    }.items():
        status, _, err = call(*words)
        assert status == 2 and message in err and "Traceback" not in err, err


# ---- what is refused, before anything trains or is written ---------------------------------------------------------------


def test_methods_that_ask_for_more_are_refused_by_name(tmp_path: Path) -> None:
    possible = (
        "fedex-lora, fedit, fedloru, fedsa-lora, fedsvd, ffa-lora, flasc, flexlora, flora, florist, frlora, lora-fair, mfedloru"
    )
    for method, needs in (("lora-a2", "grad, mask, probe"), ("hetlora", "penalty"), ("fedavg", "full"), ("feddpa", "gate, slots")):
        with pytest.raises(BadInput) as error:
            run(tmp_path, method, out=tmp_path / "run")
        assert f" needs {needs}, and a transformers.Trainer with a PEFT adapter has none; possible: {possible}, " in str(
            error.value
        )
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="FedSA-LoRA needs C, D"):
        run(tmp_path, {"name": "fedsa-lora", "variant": "vera"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": tiny_lm.base}, "client: LlamaForCausalLM has no LoRA adapter; give it one"),
        ({"model": lambda: adapted(use_dora=True)}, "client: the adapter's use_dora = True"),
        ({"model": lambda: adapted(rank_pattern={"q_proj": 4})}, "client: the adapter's rank_pattern = "),
        ({"model": lambda: adapted(init_lora_weights="pissa")}, "client: init_lora_weights = 'pissa' changes the base model"),
        (
            {"model": lambda: adapted(target_modules=["embed_tokens"])},
            "client: the adapter is on model.embed_tokens, which is no linear",
        ),
        ({"train_dataset": None}, "client: it has no train_dataset"),
        ({"train_dataset": iter([])}, "client: its train_dataset, list_iterator, has no length"),
        ({"model_init": lambda: adapted()}, "client: model_init makes the model anew"),
    ],
)
def test_trainers_that_cannot_be_clients_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    known = {"model": adapted, **changes}
    made = trainer(DATA[0], tmp_path, known["model"](), **{k: v for k, v in changes.items() if k == "model_init"})
    if "train_dataset" in changes:
        made.train_dataset = changes["train_dataset"]
    with pytest.raises(BadInput) as error:
        fedlora.client(made)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_more_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^client: PeftModelForCausalLM is no transformers.Trainer"):
        fedlora.client(adapted())
    free = adapted()
    free.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(BadInput, match=r"lm_head.weight trains too, beside the adapter"):
        fedlora.client(trainer(DATA[0], tmp_path, free))
    made = trainer(DATA[0], tmp_path)
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=1.0)
    with pytest.raises(BadInput, match="it was given an optimizer"):
        fedlora.client(made)
    joining = clients(tmp_path)
    with pytest.raises(BadInput, match="two clients are called north"):
        run(tmp_path, joining=[joining[0], joining[0]])
    with pytest.raises(BadInput, match="dict beside clients"):
        run(tmp_path, joining=[joining[0], {"text": []}])
    other = fedlora.client(trainer(DATA[0], tmp_path, adapted(lora_alpha=1)), "west")
    with pytest.raises(BadInput, match=r"clients north and west differ in their lora_alpha: 6.0 and 1.0; all must agree"):
        run(tmp_path, joining=[joining[0], other])
    model = adapted()
    model.get_base_model().model.layers[1].self_attn.q_proj.base_layer.weight.data += 1e-3
    with pytest.raises(BadInput, match=r"other base models: the weights of model.layers.1.self_attn.q_proj differ"):
        run(tmp_path, joining=[joining[0], fedlora.client(trainer(DATA[0], tmp_path, model), "west")])
    with pytest.raises(BadInput, match=r"^train.lr = 0.1: clients have trainers of their own, which decides on it; leave it out"):
        run(tmp_path, joining=joining, settings={"train.lr": 0.1})
    with pytest.raises(BadInput, match=r"^clients.rank = 4: clients have trainers of their own, which says \[2, 2\]; leave it out"):
        run(tmp_path, joining=joining, rank=4)
