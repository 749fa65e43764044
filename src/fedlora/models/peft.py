"""PEFT adapters, the format that results leave in. The one module that imports peft.

A federated result is W + s_1 B_1 A_1 + ... + merged pairs: one adapter whose factors are the stacks. Ranks may differ by module;
where a stack is wider than the matrix it is compressed losslessly by its SVD.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.algebra.lowrank import factored_svd
from fedlora.models.load import Pretrained, quiet
from fedlora.models.slots import layer_shape
from fedlora.types import Factors, Mix, Model


def is_adapter(model: Model) -> bool:
    """Whether a result is a fixed low-rank change of the base, so that an adapter can hold it."""
    return has_fixed_weights(model) and not model.full and not model.base.dense and not model.drop_base


def has_fixed_weights(model: Model) -> bool:
    """Whether the weights of the slots depend neither on the input nor on its task."""
    return model.gate is None or isinstance(model.gate, Mix)


def stack(model: Model) -> Factors:
    """The whole change as one slot of scale 1: B (d_out, R), A (R, d_in), R the sum of ranks, at most min(d_out, d_in)."""
    weights = model.gate.weights if isinstance(model.gate, Mix) else {}
    slots = [replace(f, scale=f.scale * weights.get(name, 1.0)) for name, f in model.slots.items() if weights.get(name, 1.0) != 0.0]
    parts = [*slots, *model.base.pairs]
    modules = list(dict.fromkeys(m for f in parts for m in f.A))
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for m in modules:
        own = [f for f in parts if m in f.A]
        a = torch.cat([f.A[m].float() for f in own])
        b = torch.cat([_scaled(f, m) for f in own], dim=1)
        if len(own) > 1 and a.shape[0] > min(b.shape[0], a.shape[1]):
            U, S, Vt = factored_svd(b, a)
            a, b = Vt, U * S
        A[m], B[m] = a, b
    return Factors(A, B, 1.0)


def _scaled(f: Factors, m: str) -> Tensor:
    """scale * D B C of one module, (d_out, r)."""
    b = f.B[m].float() * f.scale
    if m in f.C:
        b = b @ f.C[m].float() if f.C[m].ndim == 2 else b * f.C[m].float()
    return b * f.D[m].float()[:, None] if m in f.D else b


def save_adapter(pretrained: Pretrained, result: Model, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the head travels along, so that the logits are the same.

    `pretrained.model` must hold the run's head, and is wrapped by PEFT from then on. The base's own weights are not written.
    """
    import peft

    whole = stack(result)
    ranks = {m: A.shape[0] for m, A in whole.A.items()}
    rank = max(ranks.values())
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=rank,  # scale 1: the stack already carries its scales
        rank_pattern={m: r for m, r in ranks.items() if r != rank},
        alpha_pattern={m: r for m, r in ranks.items() if r != rank},
        target_modules=list(ranks),
        modules_to_save=head_modules(pretrained),
        fan_in_fan_out=any(type(pretrained.model.get_submodule(m)).__name__ == "Conv1D" for m in ranks),
        base_model_name_or_path=pretrained.source,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(pretrained.model, config)
        for m in ranks:
            layer: Any = wrapped.base_model.model.get_submodule(m)
            layer.lora_A["default"].weight.data = whole.A[m].clone()
            layer.lora_B["default"].weight.data = whole.B[m].clone()
        wrapped.save_pretrained(folder, save_embedding_layers=False)


def head_modules(pretrained: Pretrained) -> list[str]:
    """The top-level modules outside the base model: "classifier" or "score"."""
    return list(dict.fromkeys(name.split(".")[0] for name in pretrained.head))


def merged(pretrained: Pretrained, result: Model) -> dict[str, Tensor]:
    """Parameter name -> fp32 value of every parameter that the result changes."""
    parameters = dict(pretrained.model.named_parameters())
    values = {name: parameters[name].float() + delta.float() for name, delta in result.full.items()}
    changes: dict[str, Tensor] = dict(result.base.dense)
    pairs = stack(Model(result.slots, result.base, gate=result.gate))
    for m in pairs.A:
        product = pairs.B[m] @ pairs.A[m]
        changes[m] = changes[m] + product if m in changes else product
    for m, change in changes.items():
        name, module = f"{m}.weight", pretrained.model.get_submodule(m)
        before = torch.zeros_like(parameters[name]).float() if result.drop_base else values.get(name, parameters[name].float())
        values[name] = before + (
            change if tuple(before.shape) == layer_shape(module) and type(module).__name__ != "Conv1D" else change.mT
        )
    return values


def save_model(pretrained: Pretrained, result: Model, folder: Path) -> None:
    """Write the whole model with the result merged into its weights, in fp32, and its tokenizer."""
    state = {name: tensor.detach() for name, tensor in pretrained.model.state_dict().items()} | merged(pretrained, result)
    with quiet():
        pretrained.model.save_pretrained(folder, state_dict=state)
        if pretrained.tokenizer is not None:
            pretrained.tokenizer.save_pretrained(folder)
