"""The base model that stays in memory: frozen, with slots on its target modules, and with what has been merged into it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedlora.models.casting import at_least_fp32, cast
from fedlora.models.load import Pretrained
from fedlora.models.quantised import is_packed, is_quantised
from fedlora.models.quantised import weight as dequantised_weight
from fedlora.models.slots import Adapted, transposed
from fedlora.types import BaseUpdate


class Merges:
    """What has been merged into a base. The sum is kept apart in fp32, so the base at a version has the same bits however it got
    there.

    Attributes:
        version: how many merges there are.
        total: module -> the sum of all merges, (d_out, d_in) in fp32.
    """

    def __init__(self) -> None:
        self.version, self.total = 0, dict[str, Tensor]()

    def take(self, update: BaseUpdate) -> frozenset[str] | None:
        """Go to `update.version`; the modules of which something is merged, or was before. None, and nothing is done, where the
        update starts after the version that this is at."""
        if update.version == self.version:
            return frozenset()
        before = set(self.total)
        if update.dense:
            self.total = dict(update.dense)
        else:
            if not update.since <= self.version < update.version:
                if update.since:
                    return None
                self.version, self.total = 0, {}  # the update holds the whole history, so start over
            for pair in update.pairs[self.version - update.since :]:
                for m, B in pair.B.items():
                    self.total[m] = self.total.get(m, torch.zeros(())) + pair.scale * (B @ pair.A[m])
        self.version = update.version
        return frozenset({*before, *self.total})


class ResidentBase:
    """A pre-trained model on `device`, computing in `dtype`.

    Attributes:
        pretrained: parameter name -> its pre-trained value, as precise as it was loaded: at most fp32 is needed of it.
            Quantised weights are as they are packed: nothing is merged into them.
        parameters: parameter name -> the model's own, as it computes.
        shapes: target module -> (d_out, d_in).
        params: parameter name -> shape, of what full fine-tuning trains: everything but the head and quantised weights.
        merges: what has been merged into it.
        dropped: whether the target modules are without their own weights: see `drop`.
    """

    def __init__(self, pretrained: Pretrained, targets: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        # These values live on here: a model that is cast below gets new storage for its parameters.
        self.pretrained: dict[str, Tensor] = {name: p.detach() for name, p in pretrained.model.named_parameters()}
        self.head_names = pretrained.head
        self.model = cast(pretrained.model, dtype, device)
        self.adapted = Adapted(self.model, targets)
        self.shapes = self.adapted.shapes
        self.parameters = dict(self.model.named_parameters())
        self.params = {
            name: tuple(p.shape) for name, p in self.parameters.items() if name not in self.head_names and not is_packed(p)
        }
        self.merges, self.dropped = Merges(), False

    @property
    def version(self) -> int:
        """How many merges it holds."""
        return self.merges.version

    @property
    def merged(self) -> dict[str, Tensor]:
        """Target module -> the sum of all merges, (d_out, d_in) in fp32."""
        return self.merges.total

    def base_weight(self, module: str) -> Tensor:
        """The pre-trained weight of a target module, (d_out, d_in) in fp32."""
        layer = self.adapted.modules[module]
        if is_quantised(layer):
            return dequantised_weight(layer).cpu()
        weight: Tensor = at_least_fp32(self.pretrained[f"{module}.weight"])
        return weight.mT if transposed(layer) else weight

    @property
    def transposed(self) -> frozenset[str]:
        """The target modules whose weight parameter is stored (d_in, d_out)."""
        return frozenset(m for m in self.shapes if transposed(self.adapted.modules[m]))

    @property
    def head(self) -> dict[str, Tensor]:
        """The head's parameters as the seed drew them, fp32."""
        return {name: at_least_fp32(self.pretrained[name]) for name in self.head_names}

    def fold(self, update: BaseUpdate) -> bool:
        """Bring the base to `update.version`; False, and nothing is done, where the update starts after the version it is at."""
        changed = self.merges.take(update)
        if changed is None:
            return False
        self._show(changed)
        return True

    def drop(self, dropped: bool) -> None:
        """With True, a target module's own weight is what was merged into it, or zero; with False, it is itself again."""
        if dropped != self.dropped:
            self.dropped = dropped
            self._show(self.shapes)

    def _show(self, modules: Iterable[str]) -> None:
        """Give these modules the weights that the state of the base says."""
        for m in modules:
            name = f"{m}.weight"
            value = torch.zeros_like(self.pretrained[name]) if self.dropped else self.pretrained[name]
            if m in self.merged:
                value = at_least_fp32(value) + (self.merged[m].mT if transposed(self.adapted.modules[m]) else self.merged[m])
            self._write(name, value)

    @contextmanager
    def as_pretrained(self) -> Iterator[None]:
        """Within, all weights are the pre-trained ones."""
        dropped = self.dropped
        for name in (f"{m}.weight" for m in {*self.merged, *(self.shapes if dropped else ())}):
            self._write(name, self.pretrained[name])
        try:
            yield
        finally:
            self._show({*self.merged, *(self.shapes if dropped else ())})

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, these parameters have these values."""
        before = {name: self.parameters[name].data for name in values}
        for name, value in values.items():
            self._write(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                self.parameters[name].data = value

    def _write(self, name: str, value: Tensor) -> None:
        self.parameters[name].data = value.to(device=self.device, dtype=self.dtype)
