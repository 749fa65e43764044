"""Base models whose linear layers bitsandbytes keeps in 4 or 8 bits; embeddings, norms and the head stay as they are.

4 bits are NF4 in blocks of 64 weights, the scales of the blocks in 8 bits (QLoRA, 2305.14314). 8 bits are a scale for each row, as
in LLM.int8() (2208.07339). A layer multiplies what it is given with the weights that these stand for, which are there for the
moment of the product only. Such weights are frozen: nothing is added to them.

With 8 bits bitsandbytes itself does so in training on a CPU. Elsewhere it rounds what a layer is given to 8 bits, too, all but the
columns in which some row is large: what a model then says of a text hangs on what shares a pass with it, and what a token says on
the tokens after it. Here no row depends on another.
"""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedlora.errors import BadInput

PACKAGE, EXTRA = "bitsandbytes", "quant"
WIDTH = 64  # of a block of weights that share a scale; on a CPU, layers that cut one can end the process
PACKED = {"Params4bit": "4bit", "Int8Params": "8bit"}  # the classes of such weights


def require_package(what: str) -> None:
    """BadInput where bitsandbytes is not installed, which `what` asks for."""
    if find_spec(PACKAGE) is None:
        raise BadInput(f"not installed: {PACKAGE}, which {what} asks for; pip install 'fedlora[{EXTRA}]'")


def arguments(key: str, wanted: str | None, hf_config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told of a language model that is to be quantised, or that its checkpoint has so; nothing of others.

    Args:
        key: what messages begin with.
        wanted: "4bit", "8bit" or None.
        dtype: in which the model computes.

    Raises:
        BadInput: bitsandbytes is missing, the checkpoint is quantised otherwise than is wanted or possible, or has too narrow
            layers.
    """
    own = of_checkpoint(hf_config)
    if wanted is None and own is None:
        return {}
    if own not in (None, *PACKED.values()):
        raise BadInput(f"{key}: its weights are quantised by {own}; only unquantised ones and those of {PACKAGE} can be used here")
    if None not in (wanted, own) and wanted != own:
        raise BadInput(f"model.quantise = '{wanted}': {key} is in {own} already; leave model.quantise out")
    require_package(f"{key}, which is in {own}," if own else f"model.quantise = '{wanted}'")
    _refuse_narrow(key, hf_config)
    # Always rounded on the CPU: a GPU rounds some weights otherwise, and machines of one federation must have one base.
    return {"dtype": dtype, "device_map": "cpu"} | ({} if own else {"quantization_config": _settings(str(wanted), dtype)})


def _settings(wanted: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if wanted == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def of_checkpoint(hf_config: Any) -> str | None:
    """How a checkpoint's weights are quantised: "4bit", "8bit", the name of another method, or not."""
    found = getattr(hf_config, "quantization_config", None)
    if found is None:
        return None
    said = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method") or PACKAGE))  # older ones name none
    return method if method != PACKAGE else "4bit" if said.get("load_in_4bit") else "8bit"


def refuse_quantised(key: str, wanted: str | None, hf_config: Any = None) -> None:
    """BadInput where a model that is no language model is to be quantised, or is."""
    if wanted is not None:
        raise BadInput(f"model.quantise = '{wanted}': only language models (task causal_lm) can be quantised; leave it out")
    own = of_checkpoint(hf_config)
    if own is not None:
        raise BadInput(f"{key}: its weights are quantised ({own}), which only language models' may be; take the full checkpoint")


def _refuse_narrow(key: str, hf_config: Any) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    found = getattr(hf_config, "quantization_config", None)
    left_out = None if found is None else (found if isinstance(found, dict) else found.to_dict()).get("llm_int8_skip_modules")
    kept = HfQuantizer.get_modules_to_not_convert(model, left_out, model._keep_in_fp32_modules)
    for name, module in model.named_modules():
        if not (type(module) is nn.Linear or type(module).__name__ == "Conv1D") or not should_convert_module(name, kept):
            continue
        width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
        if width % WIDTH:
            raise BadInput(
                f"{key}: {name} is {width} wide, and quantised layers must be a multiple of {WIDTH} wide; leave model.quantise out"
            )


def bits(model: nn.Module) -> str | None:
    """ "4bit" or "8bit" of a model with such layers; None of others."""
    return next((PACKED[type(layer.weight).__name__] for layer in layers(model)), None)


def layers(model: nn.Module) -> Iterator[Any]:
    """The quantised layers of a model."""
    return (module for module in model.modules() if is_quantised(module))


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is packed."""
    return is_packed(getattr(module, "weight", None))


def is_packed(parameter: Any) -> bool:
    """Whether a parameter holds weights in 4 or 8 bits."""
    return type(parameter).__name__ in PACKED


def weight(layer: Any) -> Tensor:
    """What a quantised layer's weight stands for, (d_out, d_in) in fp32."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    found: Tensor = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    return found.float()


def count(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: of one in 4 bits, more than it holds."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def was_transposed(layer: nn.Module) -> bool:
    """Whether a quantised layer stands for one that stores its weight as (d_in, d_out), as GPT-2's Conv1D does."""
    return getattr(layer, "source_cls", type(layer)).__name__ == "Conv1D"


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the quantised layers of a model compute in `dtype`, in training and in scoring alike."""
    for layer in layers(model):
        if PACKED[type(layer.weight).__name__] == "8bit":
            layer.forward = partial(_product, layer)
        else:
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            # Else its weights are packed anew, on CPUs with AVX512-BF16, for a product without a gradient.
            layer.support_avx512bf16_for_cpu = False


def _product(layer: Any, x: Tensor) -> Tensor:
    """What a quantised layer makes of its input, (..., d_in) -> (..., d_out), in the input's dtype."""
    y: Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """W x, with W there only while it is used: once forward, once backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return linear(x, weight(layer).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ weight(ctx.layer).to(grad.dtype), None


def move(model: Any, device: torch.device) -> Any:
    """The model on `device`, with what 8-bit layers keep beside their parameters."""
    model = model.to(device)
    for layer in layers(model):
        if PACKED[type(layer.weight).__name__] == "8bit":
            for keeper in (layer.weight, layer.state):
                keeper.CB = None if keeper.CB is None else layer.weight.data
                keeper.SCB = None if keeper.SCB is None else keeper.SCB.to(device)
    return model


def dequantised(model: Any) -> Any:
    """The model with plain layers in fp32, in whose weights what was rounded stays so."""
    return model if bits(model) is None else model.dequantize(dtype=torch.float32).requires_grad_(False)
