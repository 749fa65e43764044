"""A transformers model in two halves: the body below its head, and the head alone.

The head runs on the one token of each packed text that it reads. It is the model's own head, whatever it is made of: the body is
stood in for by its output. A head for which that does not do (it reads more than hidden states and a pooled vector) is run
together with its body, as `Whole`; `trial` finds out which. A language model's head runs on the rows before the tokens that the
loss is on, a few at a time: see `likelihood`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.models import attention
from fedlora.models.casting import at_least_fp32
from fedlora.models.packing import Form, Inputs, Shared
from fedlora.models.slots import inside_base


def outside_body(model: Any) -> list[str]:
    """Names of the parameters of the head: all that stands outside the base model."""
    names = [name for name, _ in model.named_parameters()]
    inside = set(inside_base(model, names))
    return [name for name in names if name not in inside]


class Body(nn.Module):
    """The model below its head. Packed texts -> the token that the head reads, (texts, d); padded ones -> all tokens."""

    def __init__(self, model: Any, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, inputs: Inputs) -> Tensor:
        hidden = self.all_tokens(inputs)
        return hidden if inputs.read is None else hidden.flatten(0, -2)[inputs.read]

    def all_tokens(self, inputs: Inputs) -> Tensor:
        """The last hidden states: (rows, d) packed, (texts, longest, d) padded."""
        base = self.model.base_model
        if inputs.layout is None:
            padded: Tensor = base(**_arguments(self.model, inputs, self.form))[0]
            return padded
        with attention.laid_out(inputs.layout):
            packed: Tensor = base(input_ids=inputs.values, position_ids=inputs.positions)[0]
        return packed[0]


class Head(nn.Module):
    """The model's head: what `Body` gave -> logits, (texts, classes)."""

    def __init__(self, model: Any, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, hidden: Tensor, inputs: Inputs) -> Tensor:
        if inputs.layout is None:
            arguments = _arguments(self.model, inputs, self.form)
        else:  # one token a text, and none of them padding: for heads that look for the last token that is not
            hidden = hidden[:, None]
            arguments = {"input_ids": torch.full(hidden.shape[:2], self._some_token(), device=hidden.device)}
        with _body_gives(self.model.base_model, hidden):
            return at_least_fp32(self.model(**arguments).logits)

    def _some_token(self) -> int:
        return 1 if padding(self.model) == 0 else 0


class Whole(nn.Module):
    """Body and head in one: padded texts -> logits, (texts, classes)."""

    def __init__(self, model: Any, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, inputs: Inputs) -> Tensor:
        return at_least_fp32(self.model(**_arguments(self.model, inputs, self.form)).logits)


def logits(model: Any, form: Form, inputs: Inputs) -> Tensor:
    """The model's logits of texts in its form, (texts, classes): body and head apart where it can be split. Of a language model,
    those of all tokens, (rows, words)."""
    if form.tokens:
        return logits_of(model, Body(model, form).all_tokens(inputs).flatten(0, -2))
    if not form.split:
        whole: Tensor = Whole(model, form)(inputs)
        return whole
    halves: Tensor = Head(model, form)(Body(model, form)(inputs), inputs)
    return halves


def logits_of(model: Any, states: Tensor) -> Tensor:
    """What a language model makes of last hidden states, (t, d) -> (t, words): its own head, with whatever scales and caps it
    has, its body being stood in for."""
    with _body_gives(model.base_model, states[None]):
        given: Tensor = model(input_ids=torch.zeros(1, len(states), dtype=torch.int64, device=states.device)).logits
    return at_least_fp32(given[0])


def text_config(model: Any) -> Any:
    """The configuration of the model's text part: of models of several kinds of input, a part of the whole one."""
    try:
        return model.config.get_text_config()
    except ValueError:  # several text parts
        return model.config


def padding(model: Any) -> int:
    """The id of the padding token, 0 where there is none."""
    id = getattr(text_config(model), "pad_token_id", None)
    return 0 if id is None else int(id)


def _arguments(model: Any, inputs: Inputs, form: Form) -> dict[str, Tensor | None]:
    given: dict[str, Tensor | None] = {model.main_input_name if form.shared is Shared.STACKED else "input_ids": inputs.values}
    return {**given, "attention_mask": inputs.mask} if form.masked else given


@contextmanager
def _body_gives(base: Any, hidden: Tensor) -> Iterator[None]:
    """The base model, called within, answers with these hidden states, and with what its pooler makes of them."""
    pooler = getattr(base, "pooler", None)
    output = _output()(hidden, None if pooler is None else pooler(hidden))
    base.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del base.forward


@cache
def _output() -> Any:
    """The class of what bodies give, with all that some head looks for."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

    @dataclass
    class BodyOutput(Output):  # type: ignore[misc]
        router_logits: Any = None

    return BodyOutput
