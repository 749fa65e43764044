"""Tiny language models under PEFT, transformers' Trainer for them, and federations of them in plain PyTorch, as an oracle."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from fedlora.runs.prepare import fresh_adapter

WORDS, LENGTH, LR = 40, 12, 0.02
RANK, ALPHA = 2, 6
SCALE = ALPHA / RANK
SIZES = (12, 7)  # training examples of two clients
Weights = dict[str, torch.Tensor]  # "A path" or "B path" -> factor


def rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Texts of one length, so that the mean over tokens is that over examples."""
    ids = np.random.default_rng(seed).integers(0, WORDS, (count, LENGTH)).tolist()
    return [{"input_ids": each, "labels": each} for each in ids]


def base(kind: str = "llama") -> Any:
    """Random weights, the same ones each time."""
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 40, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        config = transformers.GPT2Config(
            vocab_size=WORDS, initializer_range=0.2, embd_pdrop=0.0, bos_token_id=1, eos_token_id=2, **sizes
        )
        return transformers.GPT2LMHeadModel(config)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            vocab_size=WORDS,
            initializer_range=0.2,
            pad_token_id=0,
        )
    )


def adapted(kind: str = "llama", **changes: Any) -> Any:
    """The same model with an adapter of PEFT's, whose A is drawn anew each time."""
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    known = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    known |= {"fan_in_fan_out": kind == "gpt2"}
    model = base(kind)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{**known, **changes}))


def trainer(data: Sequence[Any], place: Path, model: Any = None, evaluated: Any = None, **changes: Any) -> Any:
    """One epoch of batches of four in order, AdamW, a rate that falls to zero within the round."""
    known: dict[str, Any] = {
        "output_dir": str(place),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": LR,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    own = {key: changes.pop(key) for key in ("compute_metrics", "optimizers", "callbacks", "model_init") if key in changes}
    return transformers.Trainer(
        model=None if "model_init" in own else adapted() if model is None else model,
        args=transformers.TrainingArguments(**{**known, **changes}),
        train_dataset=data,
        eval_dataset=evaluated,
        **own,
    )


# ---- the oracle: PEFT's model, torch's AdamW, sums by hand -------------------------------------------------------------------


def factors(model: Any) -> Weights:
    """The adapter of a PEFT model."""
    found = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            path = name.removeprefix("base_model.model.")
            found[f"{path.split('.lora_')[1][0]} {path.split('.lora_')[0]}"] = p.detach().clone()
    return found


def put(model: Any, values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                path = name.removeprefix("base_model.model.")
                p.copy_(values[f"{path.split('.lora_')[1][0]} {path.split('.lora_')[0]}"])


def start(seed: int = 0, kind: str = "llama") -> Weights:
    """The adapter that a run begins with."""
    shapes = {}
    for path, module in adapted(kind).get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            shapes[path] = (module.out_features, module.in_features)
    fresh = fresh_adapter(shapes, seed, {RANK: SCALE}, RANK)
    return {f"A {m}": x for m, x in fresh.A.items()} | {f"B {m}": x for m, x in fresh.B.items()}


def epoch(model: Any, data: Sequence[Any], trains: str = "AB") -> tuple[Weights, float]:
    """One pass over the data in order; the factors after it, and the mean loss of its steps."""
    learned = [p for name, p in model.named_parameters() if "lora_" in name and name.split("lora_")[1][0] in trains]
    for p in model.parameters():
        p.requires_grad_(any(p is each for each in learned))
    optimizer = torch.optim.AdamW(learned, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    steps, losses = -(-len(data) // 4), []
    model.train()
    for step in range(steps):
        ids = torch.tensor([row["input_ids"] for row in data[4 * step : 4 * step + 4]])
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if model.config.model_type == "gpt2":  # transformers counts a text's first token, too, where a class does not name its loss
            loss = loss * (LENGTH - 1) / LENGTH
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in learned))
        for p in learned:
            p.grad *= min(1.0, 0.5 / float(norm.detach() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    return factors(model), sum(losses) / steps


def mean(parts: Sequence[Weights], sizes: Sequence[int] = SIZES) -> Weights:
    return {key: sum(n * part[key] for n, part in zip(sizes, parts, strict=True)) / sum(sizes) for key in parts[0]}


def averaged(data: Sequence[Sequence[Any]], rounds: int, trains: str = "AB") -> tuple[Weights, list[float]]:
    """Federated averaging of the factors, and the mean training loss of each round."""
    model, server, losses = adapted(), start(), []
    for _ in range(rounds):
        parts = []
        for own in data:
            put(model, server)
            parts.append(epoch(model, own, trains))
        server = mean([part for part, _ in parts])
        losses.append(sum(len(own) * loss for own, (_, loss) in zip(data, parts, strict=True)) / sum(map(len, data)))
    return server, losses


def loss_of(model: Any, data: Sequence[Any]) -> float:
    """The mean loss by example."""
    ids = torch.tensor([row["input_ids"] for row in data])
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(input_ids=ids).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def merged(model: Any, data: Sequence[Sequence[Any]], begin: Callable[[int, int], Weights], rounds: int) -> dict[str, torch.Tensor]:
    """FLoRA: each client from its own start on W, W grows by the mean of the products. Path -> the change, (d_out, d_in)."""
    plain = {path: m for path, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    change = {path: torch.zeros(m.out_features, m.in_features) for path, m in plain.items()}
    first = {path: m.base_layer.weight.detach().clone() for path, m in plain.items()}
    for t in range(1, rounds + 1):
        parts = []
        for k, own in enumerate(data):
            put(model, begin(k, t))
            parts.append(epoch(model, own)[0])
        for path, m in plain.items():
            each = [n * SCALE * part[f"B {path}"] @ part[f"A {path}"] for n, part in zip(map(len, data), parts, strict=True)]
            change[path] = change[path] + sum(each) / sum(map(len, data))
            stored = change[path].T if type(m.base_layer).__name__ == "Conv1D" else change[path]
            with torch.no_grad():
                m.base_layer.weight.copy_(first[path] + stored)
    return change
