"""Where to compute, and in which precision."""

from pathlib import Path

import torch

from fedlora.config import Config
from fedlora.errors import BadInput


def pick_device(wanted: str) -> torch.device:
    """ "auto" is a GPU where there is one. BadInput for "cuda" without one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput('device = "cuda": torch sees no GPU here; use device = "auto" or "cpu"')
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights and activations: bfloat16 where the hardware multiplies it natively, else float32.
    Adapters, their gradients' sums and the optimiser stay in float32 either way."""
    if wanted == "fp32":
        return torch.float32
    if wanted == "bf16" or _has_bf16(device):
        return torch.bfloat16
    return torch.float32


def dtype_of(config: Config) -> torch.dtype:
    """In which the frozen model of a run computes."""
    return pick_dtype(config.precision, pick_device(config.device))


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
