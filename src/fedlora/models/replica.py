"""A model once more on the same parameters, so that two threads can run it at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch import nn

from fedlora.models.heads import logits
from fedlora.models.packing import Form
from fedlora.models.slots import Adapted
from fedlora.models.trial import made_up


def replica(adapted: Adapted, form: Form, dtype: torch.dtype) -> Adapted | None:
    """The model with modules, buffers and slots of its own and the same parameters; None where it cannot have that: it cannot be
    copied, or its copy still calls a layer of the original, as a hook does that keeps one in a closure."""
    adapted.release()
    try:
        model = deepcopy(adapted.model, {id(x): x for x in adapted.model.parameters()})
    except Exception:  # whatever a model's attributes raise that cannot be copied
        return None
    finally:
        adapted.attach()
    other = Adapted(model, list(adapted.modules))
    try:
        with _sealed(adapted.model), torch.no_grad():
            logits(model, form, made_up(model, form, dtype))
    except _Called:
        return None
    return other


class _Called(Exception):
    """A layer was called that nobody may call."""


@contextmanager
def _sealed(model: nn.Module) -> Iterator[None]:
    """Within, calling a module of the model raises _Called."""
    before: list[tuple[nn.Module, Any]] = [(module, module.__dict__.get("forward")) for module in model.modules()]

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise _Called

    for module, _ in before:
        module.forward = refuse
    try:
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward
