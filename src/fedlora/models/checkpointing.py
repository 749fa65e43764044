"""Gradient checkpointing: of a forward pass only what enters each block is kept, and the backward pass computes the rest again.

It is transformers' own: its blocks hand their work to a function when they are switched on and in training mode. Models here stay
in evaluation mode, for dropout is off, so the blocks alone, and not what they are made of, are in training mode while they are
called; while they work, they are not either, for some do their dropout themselves. What a forward pass finds beside its arguments
(slots, routers, the layout of packed texts, parameters in the place of the model's own) is gone when the backward pass comes, so it
is kept for the second time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedlora.errors import BadInput
from fedlora.models import attention
from fedlora.models.slots import Adapted


def switch_on(adapted: Adapted) -> list[nn.Module]:
    """Switch a model's blocks on; returns them. BadInput where transformers can do it for none of the model's."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    every = [module for module in adapted.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {inner for block in every for inner in block.modules() if inner is not block}
    blocks = [block for block in every if block not in inside]  # what a block is made of is computed again with it
    if not blocks:
        raise BadInput(
            f"train.checkpointing = true: transformers cannot checkpoint {type(adapted.model).__name__}; leave it out, and see "
            "train.batch_size and train.rows for less memory"
        )
    for block in blocks:
        block._gradient_checkpointing_func = partial(_checkpointed, adapted, block)
        block.gradient_checkpointing = True
    return blocks


@contextmanager
def checkpointing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, forward passes that are differentiated keep only what enters each of these blocks."""
    _set_training(blocks, True)
    try:
        yield
    finally:
        _set_training(blocks, False)


def _checkpointed(adapted: Adapted, block: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """What transformers calls in the place of function(*args), which is the block's forward pass."""
    contexts = partial(_contexts, adapted, block)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _contexts(adapted: Adapted, block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the block runs in the first time, and the second."""
    replaced = {name: x for name, x in block.named_parameters() if not isinstance(x, nn.Parameter)}
    return _evaluating(block), _as_it_was(adapted, block, replaced)


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    _set_training([block], False)
    try:
        yield
    finally:
        _set_training([block], True)


def _as_it_was(adapted: Adapted, block: nn.Module, replaced: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Within it, all is as it is now; `replaced` are the block's parameters that are not its own."""
    bound, routers, layout = adapted.bound, adapted.routers, attention.current()

    @contextmanager
    def within() -> Iterator[None]:
        after = adapted.bound, adapted.routers
        adapted.bound, adapted.routers = bound, routers
        own = _replace(block, replaced)
        try:
            with nullcontext() if layout is None else attention.laid_out(layout):
                yield
        finally:
            _replace(block, own)
            adapted.bound, adapted.routers = after

    return within()


def _replace(block: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put other tensors in the places of parameters; returns what was there. As `functional_call` does it, for a while."""
    before = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        places = block.get_submodule(path)._parameters
        before[name], places[leaf] = places[leaf], value
    return before


def _set_training(blocks: Sequence[nn.Module], training: bool) -> None:
    for block in blocks:
        block.training = training  # `train()` would reach what the block is made of, too
