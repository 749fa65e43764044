"""How likely a language model finds the tokens that the loss is on.

Its head is by far its widest layer: the logits of a whole batch over a vocabulary of 150,000 words would be larger than all else in
memory. So only the rows before those tokens meet it, a few at a time, and where the head is frozen the gradient of a row is made
together with its logits, which are then gone: nothing is computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlora.models.heads import logits_of

LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}  # numbers that logits may have at once: on a GPU enough to keep it busy

Of = Callable[[Tensor, Tensor], Tensor]


class Likelihood(nn.Module):
    """The head of a language model: the states of t rows (t, d) and the token that follows each (t,) -> for each of them minus the
    logarithm of its probability, and 1 where no other is likelier, (t, 2)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        if not len(states):
            return states.new_zeros(0, 2, dtype=torch.promote_types(states.dtype, torch.float32))
        few = at_once(self.model, states.device.type)
        return torch.cat([self._some(*each) for each in zip(torch.split(states, few), torch.split(tokens, few), strict=True)])

    def _some(self, states: Tensor, tokens: Tensor) -> Tensor:
        frozen = not any(p.requires_grad for p in self.parameters())
        if frozen and states.requires_grad and torch.is_grad_enabled():
            of_frozen: Tensor = _Frozen.apply(self._of, states, tokens)  # type: ignore[no-untyped-call]
            return of_frozen
        return self._of(states, tokens)

    def _of(self, states: Tensor, tokens: Tensor) -> Tensor:
        given = logits_of(self.model, states)
        right = given.detach().argmax(-1) == tokens
        return torch.stack([cross_entropy(given, tokens, reduction="none"), right.to(given.dtype)], dim=1)


class _Frozen(torch.autograd.Function):
    """`of` rows, each of which depends on its own states alone, so that the gradient of their sum is that of each."""

    @staticmethod
    def forward(ctx: Any, of: Of, states: Tensor, tokens: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            out = of(leaf, tokens)
            (grad,) = torch.autograd.grad(out[:, 0].sum(), leaf)
        ctx.save_for_backward(grad)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (own,) = ctx.saved_tensors
        return None, own * grad[:, :1].to(own.dtype), None


def words(model: Any) -> int:
    """How many tokens a language model knows: the outputs of its head."""
    head = model.get_output_embeddings()
    return (
        int(getattr(head, "out_features", head.weight.shape[0]))
        if head is not None
        else int(model.config.get_text_config().vocab_size)
    )


def at_once(model: Any, device: str) -> int:
    """Of how many rows there are logits at once."""
    return max(1, LOGITS.get(device, LOGITS["cpu"]) // words(model))
