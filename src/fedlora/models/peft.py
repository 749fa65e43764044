"""PEFT adapters, the format that results leave in. The one module that imports peft.

A federated result is W + s_1 B_1 A_1 + ... + merged pairs: one adapter whose factors are the stacks. Ranks may differ by module;
where a stack is wider than the matrix it is compressed losslessly by its SVD.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.algebra.lowrank import factored_svd
from fedlora.errors import BadInput, first_line
from fedlora.models.heads import logits
from fedlora.models.load import Pretrained
from fedlora.models.packing import Form, Inputs
from fedlora.models.quantised import was_transposed
from fedlora.models.quiet import quiet
from fedlora.models.slots import Adapted, Live, layer_shape, transposed
from fedlora.models.trial import HALF, made_up
from fedlora.types import Factors, Mix, Model

CLOSE = 1e-3  # of logits, relative to the largest one
ROUGHLY = 0.05  # the same of a model that computes in half precision


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


def one_slot(model: Model) -> Factors:
    """The whole change as one slot: the model's own where that is all, with its scale, else the stack, what is a dense sum too."""
    (slot, *more), base = list(model.slots.values()) or [Factors()], model.base
    if slot.A and not (more or model.gate or base.pairs or base.dense or slot.C or slot.D):
        return slot
    dense = {m: _factored(x) for m, x in base.dense.items()}
    pair = Factors({m: a for m, (_, a) in dense.items()}, {m: b for m, (b, _) in dense.items()})
    return stack(replace(model, base=replace(base, pairs=(*base.pairs, pair), dense={})))


def _factored(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as B (d_out, r) and A (r, d_in), r its rank in fp32, at least 1."""
    U, S, Vt = torch.linalg.svd(x.double(), full_matrices=False)
    least = S[0] * max(x.shape) * torch.finfo(torch.float32).eps
    r = max(1, int((least < S).sum()))
    return (U[:, :r] * S[:r]).float(), Vt[:r].float()


def _scaled(f: Factors, m: str) -> Tensor:
    """scale * D B C of one module, (d_out, r)."""
    b = f.B[m].float() * f.scale
    if m in f.C:
        b = b @ f.C[m].float() if f.C[m].ndim == 2 else b * f.C[m].float()
    return b * f.D[m].float()[:, None] if m in f.D else b


def save_adapter(pretrained: Pretrained, result: Model, folder: Path, revision: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the head, and what else was drawn from the seed, travels along, so
    that the logits are the same.

    `pretrained.model` must hold the run's head; PEFT wraps it meanwhile. The base's own weights are not written.

    Args:
        revision: the commit of the base on the Hub, which PEFT then loads, too.
    """
    import peft

    whole = stack(result)
    ranks = {m: A.shape[0] for m, A in whole.A.items()}
    rank = max(ranks.values())
    config = peft.LoraConfig(
        task_type=pretrained.peft_task,
        r=rank,
        lora_alpha=rank,  # scale 1: the stack already carries its scales
        rank_pattern={m: r for m, r in ranks.items() if r != rank},
        alpha_pattern={m: r for m, r in ranks.items() if r != rank},
        target_modules=list(ranks),
        modules_to_save=modules_to_save(pretrained),
        fan_in_fan_out=any(transposed(layer) or was_transposed(layer) for layer in map(pretrained.model.get_submodule, ranks)),
        base_model_name_or_path=pretrained.source,
    )
    with _as_it_was(pretrained.model), quiet():
        wrapped = peft.get_peft_model(pretrained.model, config)
        for m in ranks:
            layer: Any = wrapped.base_model.model.get_submodule(m)
            layer.lora_A["default"].weight.data = whole.A[m].clone()
            layer.lora_B["default"].weight.data = whole.B[m].clone()
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    # Of what is not set, older versions of PEFT need not hear; PEFT names the folder that the base was loaded from.
    written = {key: value for key, value in json.loads(file.read_text()).items() if value is not None}
    written["base_model_name_or_path"] = pretrained.source
    written |= {"revision": revision} if revision else {}
    written["target_modules"] = sorted(written["target_modules"])  # PEFT's order follows the hashes of the process
    file.write_text(json.dumps(written, indent=2, sort_keys=True))


def ranks_in(folder: Path) -> tuple[int, ...]:
    """The rank of each module of an adapter that was written."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return tuple(config.get("rank_pattern", {}).get(m, config["r"]) for m in config["target_modules"])


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """After it, the model has all its own modules back, frozen as they were, and no trace of PEFT."""
    tree = [(module, dict(module._modules)) for module in model.modules()]
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    own = set(model.__dict__)
    try:
        yield
    finally:
        for module, children in tree:
            module._modules.clear()
            module._modules.update(children)
        for p, requires_grad in frozen:
            p.requires_grad_(requires_grad)
        for trace in set(model.__dict__) - own:
            del model.__dict__[trace]


def rehearse(pretrained: Pretrained, targets: Sequence[str], form: Form) -> None:
    """Take a gradient of an adapter on these layers, write it to a temporary folder, let PEFT read it, and compare a text's logits
    with those that slots give: what cannot be trained, or PEFT cannot hold, shows before training and not after it.

    Raises:
        BadInput: there is no gradient; PEFT cannot write or read such an adapter, or gives other logits.
    """
    name = type(pretrained.model).__name__
    text, random = made_up(pretrained.model, form), _random(pretrained.model, targets)
    try:
        with quiet():
            wanted = _with_slots(pretrained.model, form, text, random)
    except Exception as error:  # whatever a model raises that cannot be differentiated as it is run here
        raise BadInput(f"{name} cannot be trained here: {first_line(error)}") from error
    try:
        got = _under_peft(pretrained, form, text, random)
    except Exception as error:  # PEFT raises whatever its layers do
        raise BadInput(f"PEFT cannot hold an adapter on these layers of {name}: {first_line(error)}") from error
    off = (got - wanted).abs().max()
    near = ROUGHLY if next(pretrained.model.parameters()).dtype in HALF else CLOSE
    if not off <= near * wanted.abs().max():
        raise BadInput(
            f"{name} with an adapter on these layers gives other logits under PEFT than here (off by {off:.2g}), so the result "
            "could not be used; set model.target_modules to fewer layers"
        )


def held_by_peft(pretrained: Pretrained, targets: Sequence[str], form: Form) -> list[str]:
    """Those of the targets that PEFT can hold an adapter on, kind by kind (a kind is the last part of a path): it takes the names
    of some layers of mixtures for their experts. The rehearsal's error where there is none."""
    try:
        rehearse(pretrained, targets, form)
        return list(targets)
    except BadInput as error:
        held: list[str] = []
        for kind in dict.fromkeys(m.rpartition(".")[2] for m in targets):
            own = [m for m in targets if m.rpartition(".")[2] == kind]
            with suppress(BadInput):
                rehearse(pretrained, own, form)
                held += own
        if not held:
            raise error
        held = [m for m in targets if m in held]
        rehearse(pretrained, held, form)
        return held


def _random(model: nn.Module, targets: Sequence[str]) -> Factors:
    """An adapter of rank 1 whose B is not zero."""
    draw = torch.Generator().manual_seed(0)
    shapes = {m: layer_shape(model.get_submodule(m)) for m in targets}
    A = {m: torch.randn(1, i, generator=draw) / i**0.5 for m, (_, i) in shapes.items()}
    return Factors(A, {m: torch.randn(o, 1, generator=draw) / o**0.5 for m, (o, _) in shapes.items()}, 1.0)


def _with_slots(model: nn.Module, form: Form, text: Inputs, random: Factors) -> Tensor:
    """Logits of a text through our slots, after a backward pass."""
    adapted = Adapted(model, list(random.A))
    try:
        adapted.bound = {m: [(slice(None), (Live(A, random.B[m].clone().requires_grad_(), 1.0),))] for m, A in random.A.items()}
        given = logits(model, form, text)
        given.sum().backward()  # type: ignore[no-untyped-call]
        return given.detach()
    finally:
        adapted.release()


@torch.no_grad()
def _under_peft(pretrained: Pretrained, form: Form, text: Inputs, random: Factors) -> Tensor:
    """Logits of a text through an adapter that was written and read by PEFT."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        save_adapter(pretrained, Model({"rehearsal": random}), Path(folder))
        with _as_it_was(pretrained.model), quiet():
            peft.PeftModel.from_pretrained(pretrained.model, folder)
            return logits(pretrained.model, form, text)


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


def read(pretrained: Pretrained, folder: Path, adapter: bool) -> Any:
    """The model in a folder that was exported: under PEFT on the model that is at hand, or whole."""
    import peft

    with quiet():
        if adapter:
            return peft.PeftModel.from_pretrained(pretrained.model, folder)
        return type(pretrained.model).from_pretrained(folder)


def save_model(pretrained: Pretrained, result: Model, folder: Path, shard: str = "50GB") -> None:
    """Write the whole model with the result merged into its weights, in fp32, and its generation config where it has one.

    Args:
        shard: the largest file of weights; a larger model has several, and an index of them.
    """
    values = merged(pretrained, result)
    state = {name: tensor.detach() for name, tensor in pretrained.model.state_dict().items()}
    # A tied weight has several names, and is to have one value by all of them: of two, transformers would untie them.
    first = {id(p): name for name, p in pretrained.model.named_parameters()}
    names = pretrained.model.named_parameters(remove_duplicate=False)
    state |= {name: values[first[id(p)]] for name, p in names if first[id(p)] in values}
    for past in ("finetuning_task", "task_specific_params", "prefix"):  # of the base's own task, nothing is left
        pretrained.model.config.__dict__.pop(past, None)
    with quiet():
        pretrained.model.save_pretrained(folder, state_dict=state, max_shard_size=shard)
