"""In which precision a model computes."""

from typing import Any

import torch
from torch import Tensor

from fedlora.models import quantised


def cast(model: Any, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """The model computing in `dtype`, on `device` where one is given. The frequencies of rotary positions stay as precise as
    transformers makes them: a position times a rounded frequency is off by whole turns. So do quantised weights; their layers
    compute in `dtype`, too."""
    if quantised.bits(model) is not None:
        model = model if device is None else quantised.move(model, device)
        for parameter in model.parameters():
            if not quantised.is_packed(parameter):
                parameter.data = parameter.data.to(dtype)
        quantised.compute_in(model, dtype)
        return model
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model = model.to(device=device, dtype=dtype)
    for name, buffer in exact.items():
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, buffer.to(device))
    return model


def at_least_fp32(x: Tensor) -> Tensor:
    """In fp32, or as it is where it is as precise."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
