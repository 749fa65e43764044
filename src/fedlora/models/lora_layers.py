"""The LoRA adapter of a model that its owner has put under PEFT: read, written and resized in place, layer by layer.

PEFT computes y = W x + b + scaling * B A x, as one slot of ours does, and calls its layers by the paths of the model without it.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import BadInput, some
from fedlora.models.base import Merges
from fedlora.models.slots import layer_shape, transposed
from fedlora.types import BaseUpdate, Factors, Tensors

STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of an adapter, that leave the base's weights as they are
PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}}  # what a slot can be
PLAIN |= {"layer_replication": None, "target_parameters": None, "trainable_token_indices": None}
BASE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LoraLayers:
    """A PEFT model with one adapter.

    Attributes:
        model: the PeftModel.
        name: what PEFT calls the adapter.
        layers: path in the model without PEFT -> PEFT's layer.
        saved: the parameters that train beside the factors and travel whole (PEFT's modules_to_save), by their paths in the model
            without PEFT.
        merges: what has been merged into its layers' own weights.
    """

    def __init__(self, model: Any, whose: str) -> None:
        """BadInput where this is no PEFT model with one plain LoRA adapter on linear layers; `whose` begins the message."""
        self.model, kind = model, type(model).__name__
        configs = getattr(model, "peft_config", None)
        if not isinstance(configs, Mapping) or not hasattr(model, "get_base_model"):
            raise BadInput(
                f"{whose}: {kind} has no LoRA adapter; give it one: peft.get_peft_model(model, peft.LoraConfig(...)), or "
                "peft_config=peft.LoraConfig(...) of an SFTTrainer"
            )
        if len(configs) > 1:
            raise BadInput(f"{whose}: the model has {len(configs)} adapters ({some(sorted(configs), 4)}); one is possible")
        ((self.name, self.config),) = configs.items()
        self._refuse_config(whose)
        named = list(model.get_base_model().named_modules())
        self.layers: dict[str, Any] = {path: m for path, m in named if self.name in getattr(m, "lora_A", ())}
        self.saved = dict(self._saved(named))
        self._refuse_layers(whose, named)
        self.merges = Merges()
        self._before: dict[str, Tensor] = {}  # modules that were merged into -> their own weights as they came

    def _refuse_config(self, whose: str) -> None:
        kind = getattr(self.config.peft_type, "value", self.config.peft_type)
        if kind != "LORA":
            raise BadInput(f"{whose}: the adapter is of PEFT's type {kind}; LORA is possible")
        for key, plain in PLAIN.items():
            found = getattr(self.config, key, plain)
            if found != plain and found:
                raise BadInput(f"{whose}: the adapter's {key} = {found!r}; only {plain!r} is possible")
        start = getattr(self.config, "init_lora_weights", True)
        if start not in STARTS:
            raise BadInput(
                f"{whose}: init_lora_weights = {start!r} changes the base model, which the other clients have; possible: {STARTS}"
            )

    def _refuse_layers(self, whose: str, named: list[tuple[str, nn.Module]]) -> None:
        other = [path for path, m in named if self.name in getattr(m, "lora_embedding_A", ())]
        other += [path for path, m in self.layers.items() if not _is_linear(m.get_base_layer())]
        if other:
            raise BadInput(f"{whose}: the adapter is on {some(other)}, which is no linear layer; leave it out of target_modules")
        own = {id(p) for layer in self.layers.values() for p in self._factors(layer)} | {id(p) for p in self.saved.values()}
        also = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in own]
        if also:
            raise BadInput(f"{whose}: {some(also)} trains too, beside the adapter; only the adapter travels, so freeze it")

    def _saved(self, named: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
        for path, module in named:
            copies: Any = getattr(module, "modules_to_save", None)
            if isinstance(copies, nn.ModuleDict) and self.name in copies:
                yield from ((f"{path}.{name}", p) for name, p in copies[self.name].named_parameters())

    def _factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        return layer.lora_A[self.name].weight, layer.lora_B[self.name].weight

    # ---- what it is ----------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Of the adapter, as its configuration says."""
        return int(self.config.r)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (d_out, d_in)."""
        return {m: layer_shape(layer.get_base_layer()) for m, layer in self.layers.items()}

    @property
    def transposed(self) -> frozenset[str]:
        """The modules whose own weight is stored (d_in, d_out)."""
        return frozenset(m for m, layer in self.layers.items() if transposed(layer.get_base_layer()))

    def weight(self, module: str) -> nn.Parameter:
        """A module's own weight parameter, as its layer stores it."""
        found: nn.Parameter = self.layers[module].get_base_layer().weight
        return found

    @property
    def can_merge(self) -> bool:
        """Whether the own weights are numbers that can be added to, and not quantised."""
        return all(self.weight(m).dtype in BASE_DTYPES for m in self.layers)

    # ---- the base ------------------------------------------------------------------------------------------------------

    def base_weight(self, module: str) -> Tensor:
        """The weight that a module came with, (d_out, d_in) in fp32."""
        weight = self._before.get(module, self.weight(module).detach()).to("cpu", torch.float32)
        return weight.mT if module in self.transposed else weight

    def fold(self, update: BaseUpdate) -> bool:
        """Bring the base to `update.version`; False where the update starts after the version that it is at. Sums are of fp32."""
        changed = self.merges.take(update)
        for m in changed or ():
            weight = self.weight(m)
            before = self._before.setdefault(m, weight.detach().clone())
            total = self.merges.total.get(m)
            if total is None:
                weight.data = before.clone()
                continue
            total = (total.mT if m in self.transposed else total).to(weight.device)
            weight.data = (before.float() + total).to(weight.dtype)
        return changed is not None

    # ---- its factors ---------------------------------------------------------------------------------------------------

    def read(self) -> Factors:
        """The adapter as it is, fp32 on the CPU."""
        A, B, scale = {}, {}, 1.0
        for m, layer in self.layers.items():
            A[m], B[m] = (x.detach().to("cpu", torch.float32, copy=True) for x in self._factors(layer))
            scale = float(layer.scaling[self.name])
        return Factors(A, B, scale)

    @torch.no_grad()
    def write(self, slot: Factors) -> None:
        """Take these factors and their scale; a module that the slot lacks adds nothing. Ranks may be others than before."""
        ranks = {m: len(A) for m, A in slot.A.items()}
        for m, layer in self.layers.items():
            A, B = self._factors(layer)
            if m in slot.A:
                A.data, B.data = slot.A[m].to(A, copy=True), slot.B[m].to(B, copy=True)
            else:
                B.zero_()
            rank = len(A)
            layer.lora_A[self.name].out_features = layer.lora_B[self.name].in_features = layer.r[self.name] = rank
            layer.scaling[self.name] = slot.scale
            layer.lora_alpha[self.name] = slot.scale * (rank**0.5 if self.config.use_rslora else rank)
        if ranks:
            self._configure(ranks, slot.scale)

    def _configure(self, ranks: Mapping[str, int], scale: float) -> None:
        """What PEFT writes beside the weights, so that it reads them at the same scale."""

        def alpha(rank: int) -> float:
            found = scale * (rank**0.5 if self.config.use_rslora else rank)
            return round(found) if abs(found - round(found)) < 1e-9 else found

        self.config.r = largest = max(ranks.values())
        self.config.lora_alpha = alpha(largest)
        self.config.rank_pattern = {m: r for m, r in ranks.items() if r != largest}
        self.config.alpha_pattern = {m: alpha(r) for m, r in ranks.items() if r != largest}

    def trains(self, roles: Collection[str], saved: bool) -> None:
        """Let "A", "B" or both train, and what is saved whole where `saved` is set; all else of the adapter rests."""
        for layer in self.layers.values():
            for role, factor in zip("AB", self._factors(layer), strict=True):
                factor.requires_grad_(role in roles)
        for p in self.saved.values():
            p.requires_grad_(saved)

    # ---- what is saved whole -------------------------------------------------------------------------------------------

    def read_saved(self) -> dict[str, Tensor]:
        """The parameters that travel whole, fp32 on the CPU."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.saved.items()}

    @torch.no_grad()
    def write_saved(self, values: Tensors) -> None:
        """Give them these values; those that are absent stay."""
        for name, x in values.items():
            self.saved[name].copy_(x)


def _is_linear(module: nn.Module) -> bool:
    return (isinstance(module, nn.Linear) and module.weight is not None) or transposed(module)
