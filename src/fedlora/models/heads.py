"""A transformers classifier in two halves: the body below its head, and the head alone.

The head runs on the one token of each packed text that it reads. It is the model's own head, whatever it is made of: the body is
stood in for by its output. A head for which that does not do (it reads more than hidden states and a pooled vector) is run
together with its body, as `Whole`; `trial` finds out which.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.models import attention
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
        return hidden if inputs.read is None else hidden[inputs.read]

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
            return _at_least_fp32(self.model(**arguments).logits)

    def _some_token(self) -> int:
        return 1 if padding(self.model) == 0 else 0


class Whole(nn.Module):
    """Body and head in one: padded texts -> logits, (texts, classes)."""

    def __init__(self, model: Any, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, inputs: Inputs) -> Tensor:
        return _at_least_fp32(self.model(**_arguments(self.model, inputs, self.form)).logits)


def logits(model: Any, form: Form, inputs: Inputs) -> Tensor:
    """The model's logits of texts in its form, (texts, classes): body and head apart where it can be split."""
    if not form.split:
        whole: Tensor = Whole(model, form)(inputs)
        return whole
    halves: Tensor = Head(model, form)(Body(model, form)(inputs), inputs)
    return halves


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


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


@contextmanager
def _body_gives(base: Any, hidden: Tensor) -> Iterator[None]:
    """The base model, called within, answers with these hidden states, and with what its pooler makes of them."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

    pooler = getattr(base, "pooler", None)
    output = Output(hidden, None if pooler is None else pooler(hidden))
    base.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del base.forward
