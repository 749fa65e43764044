"""A loaded model is tried before anything is written: how it is run follows from what it does, never from its name.

The measure of everything is what plain transformers gives for one text alone. A few made-up texts, one of them as long as texts of
the run can be, others with special tokens written inside, pass alone, then together in each way that `packing.Shared` lists, until
one gives the same. On the way each adapted layer's inputs are compared row by row: where they are the tokens of the texts in their
order, many clients can share a pass, each with slots of its own on its rows; elsewhere (a table of positions, experts that see some
tokens only) a pass holds one client.

Of a language model, the states from which it says what follows each token are compared, and its head is tried on one text.

Sizes are small beside a step of training: about 300 tokens, or somewhat more than one longest text of at most 1,024 tokens. All of
it is computed in fp32, whatever the run computes in: rounding must not be taken for a difference.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.errors import BadInput, first_line, some
from fedlora.models import attention
from fedlora.models.casting import cast
from fedlora.models.heads import Body, logits, logits_of, padding, text_config
from fedlora.models.packing import Form, Inputs, Packing, Positions, Reads, Shared, pack, sharing
from fedlora.models.quantised import compute_in, is_packed
from fedlora.models.quiet import quiet

MOST = 1024  # tokens of the longest text that is tried
PACK = 256  # a pack that is tried has more tokens than that
LENGTHS = (5, 1, 2, 8, 3, 8, 21)  # of the short texts, two of them equal
PLAIN = "sdpa"  # the attention that from_pretrained chooses, where a model has it
CLOSE = 1e-4  # of logits, relative to the largest one
CLOSE_ROWS = 1e-3  # of what layers are given, relative to the largest one
DIRECTIONS = 8  # along which what a layer is given is compared
FULL_BYTES = 1 << 32  # of the largest model that is cast to fp32 as a whole where it is loaded in half precision
HALF = (torch.bfloat16, torch.float16)

Ids = np.ndarray
Calls = Mapping[str, list[Tensor | None]]


@dataclass(frozen=True)
class Findings:
    """What the trial found.

    Attributes:
        targets: the adapted layers, without those that turned out to be no linear layers of the forward pass.
        limit: tokens of the longest text that the model takes in this run.
        tried: tokens of the longest text that was tried.
        notes: what a user should know, a line each.
    """

    form: Form
    targets: tuple[str, ...]
    limit: int
    tried: int
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "texts": self.form.shared.value,
            "clients": "one client a pass" if self.form.apart else "together",
            "max_length": self.limit,
            "tried_length": self.tried,
            "notes": list(self.notes),
        }


def try_model(
    model: Any,
    targets: Sequence[str],
    limit: int,
    words: int | None = None,
    specials: Sequence[int] = (),
    fewest: int = 1,
    tokens: bool = False,
) -> Findings:
    """Try a model, in evaluation mode, and switch it to the attention that its form needs.

    Args:
        targets: the adapted layers that are wished for.
        limit: tokens of the longest text that the run may have.
        words, specials: the tokenizer's number of ids, and its special ones; by default, what the model has room for.
        fewest: tokens of the shortest text that the tokenizer can give.
        tokens: it is a language model, which says what follows each token.

    Raises:
        BadInput: the model does not take plain texts, or gives another answer each time, or no target is a linear layer of the
            forward pass.
    """
    with torch.no_grad(), quiet(), block_by_block(model):
        use(model, PLAIN)
        trial = _Trial(model, targets, _vocabulary(model, words), specials, fewest, tokens)
        alone = trial.alone(limit)
        longest = max(len(text.ids) for text in alone)
        own, dropped = used(model, targets, [text.calls for text in alone])
        if targets and not own:
            raise BadInput(f"model.target_modules: {some(targets)} {dropped[targets[0]]}, so there is nothing to adapt")
        form, rows = trial.form(alone)
    aligned = [m for m in own if rows.get(m, False)]
    apart = form.shared is not Shared.ONE_TEXT and len(aligned) < len(own)
    form = replace(form, apart=apart)
    others = [m for m in own if m not in aligned] if apart else []
    usable = min(limit, _table(model, form, limit)) if longest == MOST else longest
    return Findings(form, tuple(own), usable, longest, tuple(_notes(model, form, limit, usable, longest, others, dropped)))


@dataclass(frozen=True)
class _Alone:
    """One text alone: its ids (n,), its logits (1, classes) or the states of its tokens (n, d), and what each layer was given."""

    ids: Ids
    answer: Tensor
    calls: Calls


class _TooLongError(Exception):
    """The model fails over the longest text."""


class _Trial:
    def __init__(self, model: Any, targets: Sequence[str], words: int, specials: Sequence[int], fewest: int, tokens: bool) -> None:
        self.model, self.targets, self.words, self.fewest, self.tokens = model, targets, words, fewest, tokens
        self.pad = padding(model)
        self.specials = [id for id in dict.fromkeys((*specials, self.pad)) if 0 <= id < words]
        self.device = next(model.parameters()).device
        self.masked = True

    def alone(self, limit: int) -> list[_Alone]:
        """Texts alone, in the order in which they will share a pass: the longest one, of `limit` and at most MOST tokens where the
        model takes that, stands among the others."""
        self.masked = self._takes_a_mask(min(8, limit))
        try:
            return self._each_alone(min(limit, MOST))
        except _TooLongError:
            return self._each_alone(self._longest(min(8, limit), min(limit, MOST)))

    def _takes_a_mask(self, length: int) -> bool:
        error: Exception | None = None
        for masked in (True, False):
            self.masked = masked
            error = self._fails(length)
            if error is None:
                return masked
        raise BadInput(f"{type(self.model).__name__} does not take a plain text: {first_line(error)}")

    def _longest(self, fits: int, fails: int) -> int:
        """How many tokens a text may have, between what fits and what does not."""
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._fails(middle) is None else (fits, middle)
        return fits

    def _each_alone(self, longest: int) -> list[_Alone]:
        texts = self._texts(longest)
        found: dict[int, _Alone] = {}
        for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):  # where a text is too long, the longest one says so
            ids = texts[i]
            try:
                given, calls = self._run(self._alone, [ids])
            except Exception as error:  # whatever a model raises over a text that it cannot take
                if len(ids) == longest:
                    raise _TooLongError from error
                said = f"{type(self.model).__name__} does not take a text of {len(ids)} tokens: {first_line(error)}"
                raise BadInput(said) from error
            if torch.isfinite(given).all():
                found[i] = _Alone(ids, given, calls)
            elif not (ids == self.pad).all():  # which is more than some models can take; any other text must do
                raise BadInput(f"{type(self.model).__name__} gives numbers that are not finite for a text of {len(ids)} tokens")
        return [found[i] for i in sorted(found)]

    @property
    def _alone(self) -> Form:
        """One text a pass."""
        return Form(Shared.ONE_TEXT, masked=self.masked, split=self.tokens, tokens=self.tokens)

    def form(self, alone: Sequence[_Alone]) -> tuple[Form, dict[str, bool]]:
        """The fastest form that gives what texts give alone, and for each layer whether its rows were the tokens."""
        if self.tokens:
            self._try_head(alone[0].ids)
        attention.register()
        self.model.config.use_cache = False  # decoders would keep keys and values for a generation that never comes
        use(self.model, attention.NAME)
        for reads, positions in product(Reads, Positions):
            form = Form(Shared.PACKED, Packing(reads, positions), tokens=self.tokens)
            rows = self._same(form, alone)
            if rows is not None:
                return form, rows
        # Eager attention first: on a CPU the backward pass of the fused one is several times slower.
        ways = product((Shared.PADDED, Shared.ONE_LENGTH, Shared.ONE_TEXT), ("eager", PLAIN), (False, True), (True, False))
        for shared, attention_name, left, split in ways:
            if (left and shared is not Shared.PADDED) or (self.tokens and not split):
                continue
            use(self.model, attention_name)
            form = Form(shared, None, left, self.masked, split, tokens=self.tokens)
            rows = self._same(form, alone)
            if rows is not None:
                return form, rows
        raise BadInput(f"{type(self.model).__name__} gives another answer to the same text each time, so it cannot be trained here")

    def _same(self, form: Form, alone: Sequence[_Alone]) -> dict[str, bool] | None:
        """Whether texts give in this form what they give alone; None where not. Else for each layer whether its rows, in all
        passes, were the tokens of the texts in their order."""
        found: list[dict[str, bool]] = []
        for where in sharing(form.shared, np.array([len(text.ids) for text in alone])):
            group = [alone[i] for i in where]
            try:
                given, calls = self._run(form, [text.ids for text in group])
            except Exception:  # whatever a model raises over texts in a form that it does not know
                return None
            wanted = torch.cat([text.answer for text in group])
            if given.shape != wanted.shape or not close(given, wanted, CLOSE):
                return None
            found.append({m: _tokens(form, m, calls, group, CLOSE_ROWS) for m in self.targets})
        return {m: all(each[m] for each in found) for m in self.targets}

    def _run(self, form: Form, ids: Sequence[Ids]) -> tuple[Tensor, Calls]:
        texts = pack(ids, form, self.pad, self.device)
        with watch(self.model, self.targets) as calls:
            if not self.tokens:
                return logits(self.model, form, texts), calls
            states = Body(self.model, form).all_tokens(texts).flatten(0, -2)
        inside = slice(None) if texts.mask is None else texts.mask.flatten().bool()
        return states[inside], calls

    def _try_head(self, ids: Ids) -> None:
        """Refuse a model whose head reads more than its body's last states."""
        ids = ids[: min(len(ids), 8)]
        given = torch.from_numpy(ids.astype(np.int64))[None].to(self.device)
        try:
            states, _ = self._run(self._alone, [ids])
            apart, whole = logits_of(self.model, states), self.model(input_ids=given).logits[0]
        except Exception as error:  # whatever a model raises that is run in halves
            raise BadInput(f"the head of {type(self.model).__name__} cannot be run by itself: {first_line(error)}") from error
        if not close(apart, whole.to(apart), CLOSE):
            raise BadInput(
                f"the head of {type(self.model).__name__} reads more than its body's last states; it cannot be trained here"
            )

    def _fails(self, length: int) -> Exception | None:
        ids = np.resize([id for id in range(min(self.words, 1000)) if id != self.pad] or [0], length)
        try:
            self._run(self._alone, [ids])
        except Exception as error:  # whatever a model raises over a text that it cannot take
            return error
        return None

    def _texts(self, longest: int) -> list[Ids]:
        rng = np.random.default_rng(0)
        lengths = [min(max(n, self.fewest), longest) for n in LENGTHS] + [longest]
        while sum(lengths) <= max(PACK, longest):
            lengths.append(min(longest, PACK // 2))
        texts = [rng.integers(0, self.words, n) for n in (*lengths[4:], *lengths[:4])]
        texts[-1][1:-1] = np.resize(self.specials, len(texts[-1][1:-1]))
        for where in ((-4, 0), (-4, -1), (-3, 0), (-2, -1)):  # padding tokens at both ends, alone, and last
            texts[where[0]][where[1]] = self.pad
        return texts


@contextmanager
def in_full(model: Any) -> Iterator[None]:
    """Within, a model of half precision that is small enough computes in fp32, so that rounding hides nothing that is tried."""
    dtype = next(model.parameters()).dtype
    small = 4 * sum(p.numel() for p in model.parameters()) <= FULL_BYTES
    if dtype not in HALF or not small:
        yield
        return
    cast(model, torch.float32)
    try:
        yield
    finally:
        cast(model, dtype)


@contextmanager
def block_by_block(model: Any) -> Iterator[None]:
    """Within, and without gradients, a model of half precision computes in fp32 however large it is: a block's weights are there in
    fp32 while the block computes, those outside the blocks all the time."""
    dtype = next(model.parameters()).dtype
    if dtype not in HALF:
        yield
        return
    blocks = list(_blocks(model))
    inside = {id(p) for block in blocks for p in block.parameters()}
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def enter(block: nn.Module, args: Any) -> None:
        kept[block] = _widen(block.parameters())

    def leave(block: nn.Module, args: Any, out: Any) -> None:
        _put_back(kept.pop(block, []))

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave, always_call=True) for block in blocks]
    others = _widen(p for p in model.parameters() if id(p) not in inside)
    compute_in(model, torch.float32)
    try:
        yield
    finally:
        compute_in(model, dtype)
        _put_back(others)
        for hook in hooks:
            hook.remove()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def _widen(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Cast parameters of half precision to fp32; returns what they were."""
    was = [(p, p.data) for p in parameters if p.dtype in HALF and not is_packed(p)]
    for p, data in was:
        p.data = data.float()
    return was


def _put_back(was: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    for p, data in was:
        p.data = data


def _tokens(form: Form, module: str, calls: Calls, group: Sequence[_Alone], near: float) -> bool:
    """Whether a layer's inputs, call by call, were the rows that each text has alone, side by side."""
    lengths = [len(text.ids) for text in group]
    longest = max(lengths)
    starts = np.cumsum([0, *lengths]) if form.packing is not None else np.arange(len(group) + 1) * longest
    own = calls[module]
    if not own or any(len(text.calls[module]) != len(own) for text in group):
        return False
    for i, given in enumerate(own):
        if given is None or len(given) != starts[-1]:
            return False
        for text, start, n in zip(group, starts, lengths, strict=False):
            wanted = text.calls[module][i]
            begin = start + (longest - n if form.left else 0)
            if wanted is None or len(wanted) != n or not close(given[begin : begin + n], wanted, near):
                return False
    return True


@contextmanager
def watch(model: nn.Module, targets: Sequence[str]) -> Iterator[dict[str, list[Tensor | None]]]:
    """What each layer is given in the passes within, call by call: a few numbers a row, its products with fixed random vectors
    (rows as in x (..., d) flattened to (rows, d)). None stands for a call that is not one tensor in, one tensor out."""
    calls: dict[str, list[Tensor | None]] = {m: [] for m in targets}

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            plain = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor)
            calls[name].append(_projected(args[0]) if plain else None)

        return seen

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in targets]
    try:
        yield calls
    finally:
        for each in hooks:
            each.remove()


def _projected(x: Tensor) -> Tensor:
    return x.flatten(0, -2).float() @ _directions(x.shape[-1]).to(x.device)


@cache
def _directions(width: int) -> Tensor:
    """(width, DIRECTIONS). Along one alone a row can be near zero by chance, and then its rounding is all that is seen of it."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((width, DIRECTIONS), dtype=np.float32))


def used(model: nn.Module, targets: Sequence[str], seen: Sequence[Calls], what: str = "a text") -> tuple[list[str], dict[str, str]]:
    """The targets that are linear layers of the forward pass with a weight of their own, and why others are not.

    An expert to which no token was sent is one all the same when another of its list was used.
    """
    called = {m for m in targets if any(calls[m] for calls in seen)}
    lists = {_without_last_number(m) for m in called}
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    dropped: dict[str, str] = {}
    for m in targets:
        if any(call is None for calls in seen for call in calls[m]):
            dropped[m] = "gives no plain tensor"
        elif m not in called and _without_last_number(m) not in lists:
            dropped[m] = f"is not called in the forward pass of {what}"
        elif any(holders[id(p)] > 1 for p in model.get_submodule(m).parameters(recurse=False)):
            dropped[m] = "shares its weight with another layer"
    return [m for m in targets if m not in dropped], dropped


def _without_last_number(path: str) -> str:
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join((*parts[: numbers[-1]], "#", *parts[numbers[-1] + 1 :])) if numbers else path


def token_types_count(model: Any, tokenizer: Any) -> bool:
    """Whether the tokenizer gives token types, and the model another answer with them than without, or none."""
    if "token_type_ids" not in tokenizer.model_input_names:
        return False
    inputs = dict(tokenizer("a", return_tensors="pt"))
    without = {name: x for name, x in inputs.items() if name != "token_type_ids"}
    with torch.no_grad(), quiet():
        try:
            return not close(model(**inputs).logits, model(**without).logits, CLOSE)
        except Exception:  # whatever a model raises over inputs that it does not take
            return True


def _vocabulary(model: Any, words: int | None) -> int:
    rows = rows_of_embedding(model) or getattr(text_config(model), "vocab_size", None)
    return min((int(n) for n in (rows, words) if n is not None), default=2)


def made_up(model: nn.Module, form: Form, dtype: torch.dtype = torch.float32) -> Inputs:
    """An input of one example, on the CPU."""
    device = torch.device("cpu")
    if form.shared is Shared.STACKED:
        pixels = torch.randn(form.shape, generator=torch.Generator().manual_seed(0)).numpy()
        return pack([pixels], form, 0, device, dtype)
    words, pad = rows_of_embedding(model) or 9, padding(model)
    return pack([np.array([id for id in range(min(words, 9)) if id != pad], dtype=np.int64)], form, pad, device, dtype)


def rows_of_embedding(model: Any) -> int | None:
    """How many token ids the model has an embedding for; None where that cannot be told."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return int(weight.shape[0])


def _table(model: Any, form: Form, limit: int) -> int:
    """How long texts may be by the model's own words, where they can be longer than what was tried."""
    said = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(said, int) or said <= 0:
        return limit
    return said - (padding(model) + 1 if form.packing is not None and form.packing.positions is Positions.AFTER_PADDING else 0)


def _notes(
    model: Any, form: Form, limit: int, usable: int, tried: int, others: Sequence[str], dropped: Mapping[str, str]
) -> Iterator[str]:
    name = type(model).__name__
    slower = {
        Shared.PADDED: "does not take packed texts, so they are padded: right as well, but slower",
        Shared.ONE_LENGTH: "is changed by padding, so only texts of one length share a pass: right as well, but slower",
        Shared.ONE_TEXT: "is changed by a text's neighbours, so each text has a pass of its own: right as well, but much slower",
    }
    if form.shared in slower:
        yield f"{name} {slower[form.shared]}"
    if form.apart:
        yield (
            f"{name} gives {some(others)} other rows than a text's tokens, so each client has a pass of its own: "
            "right as well, but slower"
        )
    for reason in dict.fromkeys(dropped.values()):
        yield f"{name}: {some([m for m, why in dropped.items() if why == reason])} {reason}, so no adapter is put on it"
    if usable < limit:
        yield f"data.max_length = {limit} is above the {usable} tokens that {name} takes; using {usable}"
    if tried < usable:
        yield f"texts of up to {usable} tokens are allowed; {name} was tried with texts of up to {tried}"


def close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    largest = wanted.abs().max() if wanted.numel() else torch.zeros(())
    return bool(((got - wanted).abs().max() <= tolerance * largest).item()) if wanted.numel() else True


def use(model: Any, implementation: str) -> None:
    """Switch the model's attention; a model that cannot be switched says so in its own way, and is tried all the same."""
    if model.config._attn_implementation != implementation:
        with suppress(Exception):
            model.set_attn_implementation(implementation)
