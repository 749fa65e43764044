"""A forward pass of texts of several clients side by side, each passing through its own slots."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from fedlora.data.encoded import Encoded
from fedlora.models.heads import Body, Head, Whole
from fedlora.models.likelihood import Likelihood
from fedlora.models.packing import Form, Inputs, Shared, by_size, following, pack
from fedlora.models.replica import replica
from fedlora.models.slots import Adapted, Weight, bind, bind_routers
from fedlora.tasks.base import Objective
from fedlora.training.passes import Part, filled_up, in_order, passes, take
from fedlora.types import Mix


class Forward:
    """Runs a model that has slots.

    Attributes:
        adapted: the model, on `device`, computing in `dtype`.
        form: how the model is run.
        pad: the id of the padding token.
        objective: the task: an example's logits are those of its own domain, which makes one head a head a domain.
        rows: tokens that fill a pass.
    """

    def __init__(
        self, adapted: Adapted, device: torch.device, dtype: torch.dtype, form: Form, pad: int, objective: Objective, rows: int
    ) -> None:
        self.adapted, self.device, self.dtype = adapted, device, dtype
        self.form, self.pad, self.objective, self.rows = form, pad, objective, rows
        model = adapted.model
        self._body, self._head, self._whole = Body(model, form), Head(model, form), Whole(model, form)
        self._likelihood = Likelihood(model)

    def replica(self) -> "Forward | None":
        """Another one on the same parameters, which can run at the same time, where the model can have a replica."""
        adapted = replica(self.adapted, self.form, self.dtype)
        if adapted is None:
            return None
        return Forward(adapted, self.device, self.dtype, self.form, self.pad, self.objective, self.rows)

    @property
    def domains(self) -> list[str]:
        """Their names, in a run of several."""
        return [domain.name for domain in self.objective.schema.domains]

    def _pack(self, given: Sequence[np.ndarray]) -> Inputs:
        return pack(given, self.form, self.pad, self.device, self.dtype)

    def outputs(self, parts: Sequence[Part], body: Mapping[str, Tensor]) -> list[Tensor]:
        """What the model gives of each part's examples, (n, outputs): logits, -inf for the classes of other domains, or a language
        model's sums over the tokens that the loss is on. `body` replaces parameters of the model below its head."""
        found: list[list[Tensor]] = [[] for _ in parts]
        places: list[list[np.ndarray]] = [[] for _ in parts]
        for pieces in passes(parts, self.form):
            shares = [parts[i] if len(where) == len(parts[i].data) else take(parts[i], where) for i, where in pieces]
            for (i, where), given in zip(pieces, self._pass(shares, body), strict=True):
                found[i].append(given)
                places[i].append(where)
        whole = [x[0] if len(x) == 1 else in_order(x, where, self.device) for x, where in zip(found, places, strict=True)]
        return [self.objective.within(given, part.data.domains) for given, part in zip(whole, parts, strict=True)]

    def _pass(self, parts: Sequence[Part], body: Mapping[str, Tensor]) -> list[Tensor]:
        """The same, from one forward pass."""
        few = self.form.packing is not None and by_size(self.device, self.dtype)
        filled = [filled_up(part.data) if few and not part.weights else part.data for part in parts]
        inputs = self._pack([x for data in filled for x in data.inputs])
        whose = [slice(a, b) for a, b in pairwise(accumulate(map(len, filled), initial=0))]
        spans = [slice(s.start, s.start + len(part.data)) for s, part in zip(whose, parts, strict=True)]
        ends = np.concatenate([[0], np.cumsum(inputs.lengths)])
        rows = [slice(None)] if self.form.apart else [slice(int(ends[s.start]), int(ends[s.stop])) for s in whose]
        self._bind(parts, rows, [inputs.lengths[s] for s in whose])
        try:
            if self.form.tokens:
                whole = self._of_tokens(inputs, [x for data in filled for x in data.trained], body)
                return [whole[s] for s in spans]
            if not self.form.split:  # one part, where parts have heads of their own
                whole = _call(self._whole, {**body, **parts[0].head}, inputs)
                return [whole[s] for s in spans]
            hidden = _call(self._body, body, inputs)
            if any(part.head for part in parts) or inputs.layout is None:
                each = zip(parts, spans, strict=True)
                return [_call(self._head, {**body, **part.head}, hidden[s], _some(inputs, s)) for part, s in each]
            whole = _call(self._head, body, hidden, inputs)
            return [whole[s] for s in spans]
        finally:
            self.adapted.bound, self.adapted.routers = {}, {}

    def _of_tokens(self, inputs: Inputs, trained: Sequence[np.ndarray], body: Mapping[str, Tensor]) -> Tensor:
        """Of each text the sums over its trained tokens, (texts, 2)."""
        read, tokens, owner = following(inputs, trained, self.form.left)
        states = _call(self._body, body, replace(inputs, read=read))
        found = _call(self._likelihood, body, states, tokens)
        return found.new_zeros(len(trained), 2).index_add(0, torch.from_numpy(owner).to(found.device), found)

    def _bind(self, parts: Sequence[Part], rows: Sequence[slice], lengths: Sequence[np.ndarray]) -> None:
        bound, routers = [], []
        for part, own in zip(parts, lengths, strict=True):
            weights = (
                part.gate.weights if isinstance(part.gate, Mix) else {s: self._by_row(w, own) for s, w in part.weights.items()}
            )
            bound.append(bind(part.slots, list(self.adapted.shapes), weights))
            routers.append(bind_routers(part.gate, part.slots))
        self.adapted.bound = {
            m: [(where, slots[m]) for where, slots in zip(rows, bound, strict=True)]
            for m in self.adapted.shapes
            if any(s[m] for s in bound)
        }
        self.adapted.routers = {m: [r.get(m) for r in routers] for m in self.adapted.shapes if any(m in r for r in routers)}

    @contextmanager
    def bound(self, part: Part) -> Iterator[None]:
        """Within, all that the model is given passes through the slots of one part."""
        self._bind([part], [slice(None)], [np.ones(len(part.data), dtype=np.int64)])
        try:
            yield
        finally:
            self.adapted.bound, self.adapted.routers = {}, {}

    def _by_row(self, weight: Weight, lengths: np.ndarray) -> Weight:
        """What weighs each text, for each of its rows."""
        if not isinstance(weight, Tensor):
            return weight
        return float(weight) if self.form.apart else weight.repeat_interleave(torch.from_numpy(lengths).to(weight.device))

    def hidden(self, given: Sequence[np.ndarray], read: Callable[[Tensor, Inputs], Tensor]) -> Tensor:
        """What `read` makes of the last hidden states of texts that share a pass, (n, d)."""
        inputs = self._pack(given)
        hidden = self._body.all_tokens(inputs).float()
        if self.form.shared is Shared.STACKED:  # (n, rows, d), or (n, d, height, width) of a convolution
            hidden = hidden.flatten(2).mT if hidden.ndim == 4 else hidden
            inputs = replace(inputs, lengths=np.full(len(hidden), hidden.shape[1]))
        elif inputs.layout is None and hidden.shape[1] != inputs.values.shape[1]:  # a body that shortens its texts
            if len(given) > 1:
                return torch.cat([self.hidden([each], read) for each in given])
            inputs = replace(inputs, lengths=np.array([hidden.shape[1]]), mask=None)
        return read(hidden.flatten(0, -2), inputs).cpu()

    def of_domain(self, data: Encoded, domain: str) -> Encoded:
        """The examples of one domain; all where the domain is ""."""
        return data.take(np.flatnonzero(data.domains == self.domains.index(domain))) if domain else data


def _call(module: torch.nn.Module, parameters: Mapping[str, Tensor], *args: object) -> Tensor:
    """The module's output, with these tensors in the place of its model's parameters."""
    if not parameters:
        plain: Tensor = module(*args)
        return plain
    out: Tensor = functional_call(module, {f"model.{name}": x for name, x in parameters.items()}, args)
    return out


def _some(inputs: Inputs, where: slice) -> Inputs:
    """Some of the texts, as far as a head needs to know them."""
    if inputs.layout is not None:
        return inputs
    return replace(inputs, values=inputs.values[where], mask=None if inputs.mask is None else inputs.mask[where])
