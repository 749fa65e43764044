"""PEFT adapters, the format that results leave in. The one module that imports peft.

A federated result is W + s_1 B_1 A_1 + ... + merged pairs: one adapter whose factors are the stacks. Ranks may differ by module;
where a stack is wider than the matrix it is compressed losslessly by its SVD.
"""

import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.algebra.lowrank import factored_svd
from fedlora.errors import BadInput, first_line
from fedlora.models.heads import logits, padding
from fedlora.models.load import Pretrained, quiet
from fedlora.models.packing import Form, pack
from fedlora.models.slots import Adapted, Live, layer_shape, transposed
from fedlora.types import Factors, Mix, Model

_CPU = torch.device("cpu")


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
    """Write adapter_config.json and adapter_model.safetensors; the head, and what else was drawn from the seed, travels along, so
    that the logits are the same.

    `pretrained.model` must hold the run's head; PEFT wraps it meanwhile. The base's own weights are not written.
    """
    import peft

    whole = stack(result)
    ranks = {m: A.shape[0] for m, A in whole.A.items()}
    rank = max(ranks.values())
    saved = modules_to_save(pretrained)
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=rank,  # scale 1: the stack already carries its scales
        rank_pattern={m: r for m, r in ranks.items() if r != rank},
        alpha_pattern={m: r for m, r in ranks.items() if r != rank},
        target_modules=list(ranks),
        modules_to_save=saved,
        fan_in_fan_out=any(transposed(pretrained.model.get_submodule(m)) for m in ranks),
        base_model_name_or_path=pretrained.source,
    )
    with _as_it_was(pretrained.model, [*ranks, *saved]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(pretrained.model, config)
        for m in ranks:
            layer: Any = wrapped.base_model.model.get_submodule(m)
            layer.lora_A["default"].weight.data = whole.A[m].clone()
            layer.lora_B["default"].weight.data = whole.B[m].clone()
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text())
    written["target_modules"] = sorted(written["target_modules"])  # PEFT's order follows the hashes of the process
    file.write_text(json.dumps(written, indent=2, sort_keys=True))


@contextmanager
def _as_it_was(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """After it, the model has its own modules back at these paths, and no trace of PEFT."""
    own = {path: model.get_submodule(path) for path in paths}
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        yield
    finally:
        for path, module in own.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
        for name, p in model.named_parameters():
            p.requires_grad_(frozen[name])
        for trace in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(trace, None)


def rehearse(pretrained: Pretrained, targets: Sequence[str], form: Form) -> None:
    """Take a gradient of an adapter on these layers, write it to a temporary folder, let PEFT read it, and compare a text's logits
    with those that slots give: what cannot be trained, or PEFT cannot hold, shows before training and not after it.

    Raises:
        BadInput: there is no gradient; PEFT cannot write or read such an adapter, or gives other logits.
    """
    import peft

    model = pretrained.model
    draw = torch.Generator().manual_seed(0)
    shapes = {m: layer_shape(model.get_submodule(m)) for m in targets}
    A = {m: torch.randn(1, i, generator=draw) / i**0.5 for m, (_, i) in shapes.items()}
    B = {m: torch.randn(o, 1, generator=draw) / o**0.5 for m, (o, _) in shapes.items()}
    rows = next(p.shape[0] for p in model.get_input_embeddings().parameters())
    pad = padding(model)
    text = pack([np.array([id for id in range(min(rows, 9)) if id != pad], dtype=np.int64)], form, pad, _CPU)
    saved = modules_to_save(pretrained)
    adapted = Adapted(model, targets)
    try:
        adapted.bound = {m: [(slice(None), (Live(A[m], B[m].requires_grad_(), 1.0),))] for m in targets}
        wanted = logits(model, form, text)
        wanted.sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a model raises that cannot be differentiated as it is run here
        raise BadInput(f"{type(model).__name__} cannot be trained here: {first_line(error)}") from error
    finally:
        adapted.release()
    B = {m: x.detach() for m, x in B.items()}
    try:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            save_adapter(pretrained, Model({"rehearsal": Factors(A, B, 1.0)}), Path(folder))
            with _as_it_was(model, [*targets, *saved]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft.PeftModel.from_pretrained(model, folder)
                got = logits(model, form, text)
    except Exception as error:  # PEFT raises whatever its layers do
        raise BadInput(f"PEFT cannot hold an adapter for {type(model).__name__} on these layers: {first_line(error)}") from error
    if not (got - wanted).abs().max() <= 1e-3 * wanted.abs().max():
        raise BadInput(
            f"{type(model).__name__} with an adapter on these layers gives other logits under PEFT than here (off by "
            f"{(got - wanted).abs().max():.2g}), so the result could not be used; set model.target_modules to fewer layers"
        )


def modules_to_save(pretrained: Pretrained) -> list[str]:
    """What travels with an adapter as it is: the top-level modules outside the base model ("classifier", "score"), and the modules
    below them whose parameters were drawn from the seed."""
    return list(dict.fromkeys([*(n.split(".")[0] for n in pretrained.head), *(n.rpartition(".")[0] for n in pretrained.drawn)]))


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
        values[name] = before + (change.mT if transposed(module) else change)
    return values


def save_model(pretrained: Pretrained, result: Model, folder: Path) -> None:
    """Write the whole model with the result merged into its weights, in fp32."""
    state = {name: tensor.detach() for name, tensor in pretrained.model.state_dict().items()} | merged(pretrained, result)
    for past in ("finetuning_task", "task_specific_params", "prefix"):  # of the base's own task, nothing is left
        pretrained.model.config.__dict__.pop(past, None)
    with quiet():
        pretrained.model.save_pretrained(folder, state_dict=state)
