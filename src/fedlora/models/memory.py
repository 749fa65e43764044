"""How much memory training takes, before it begins: from shapes alone, for a model without values will do.

    base           what the model's parameters take: those that are kept as they were read, and, where it computes in another
                   precision or elsewhere, those that it computes with; of methods that merge into it, target modules twice more
    adapters       of each client in a step what trains in fp32, its gradient, the optimiser's two moments, and what it passes
                   through in the precision of the pass; of each that is under way what it was sent and what it has learned
    activations    what the backward pass of a step needs. It is not guessed: a step goes forward on torch's meta device, where
                   tensors have shapes and no values, and what autograd keeps is counted (`kept`); `most_kept` is a bound that
                   costs nothing
    work           the largest tensors that a backward pass has for a moment (WORK of the widest layer's)
    head           logits of a piece of tokens of a language model: in fp32, their gradient, and in the precision of the pass

Not counted: data, the server's state, libraries. Measured in fp32 on a CPU, with an allocator that gives back at once what is freed
(encoders and decoders of 22 to 36 million parameters, 800 to 3,100 tokens a step), adapters, activations and work together were
between 0.95 and 1.35 times of what training added to the process. C's own allocator keeps some of what is freed, so that a process
then had up to 0.2 GB more. SURE leaves room for both sides.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.models import attention
from fedlora.models.checkpointing import checkpointing, switch_on
from fedlora.models.heads import Body
from fedlora.models.packing import Form, pack, sharing
from fedlora.models.slots import Adapted, bind
from fedlora.models.trial import PLAIN, use
from fedlora.types import BASE, ROLES, Factors, Slots, Train

SURE = 1.5  # a whole estimate is beyond what there is when it is so many times as much
WORK = 3.0


@dataclass(frozen=True)
class Part:
    """Some bytes, and whether they lie where the model computes, or in the main memory beside it. `sure` ones are there whatever
    the texts are like."""

    name: str
    size: int
    computing: bool = True
    sure: bool = True


@dataclass(frozen=True)
class Room:
    """What there is, in bytes, where the model computes and in the main memory; None where that is not known. On a CPU these are
    one, and `main` is None."""

    computing: int | None
    main: int | None = None


def base_parts(parameters: Collection[Tensor], device: str, dtype: torch.dtype, merged: int = 0) -> Iterator[Part]:
    """Of a model with these parameters, as they were read. `merged` counts those of the target modules, where a method merges into
    the base."""
    read = sum(p.numel() * p.itemsize for p in parameters)
    apart = device != "cpu" or any(p.dtype != dtype for p in parameters if p.is_floating_point())
    yield Part("base as it was read", read, computing=device == "cpu")
    if apart:
        yield Part(f"base in {name(dtype)}", sum(p.numel() for p in parameters) * dtype.itemsize)
    if merged:
        yield Part("what is merged into it", 4 * merged, computing=device == "cpu")
        if not apart:
            yield Part("base with what is merged", 4 * merged)


def adapter_parts(
    trained: int, held: int, together: int, under_way: int, optimizer: str, dtype: torch.dtype, device: str
) -> Iterator[Part]:
    """Of clients.

    Args:
        trained, held: parameters that a client trains, and those of all slots that it passes through.
        together: clients in a step.
        under_way: clients whose round has begun and not ended.
    """
    moments = 8 if optimizer == "adamw" else 0
    cast = 0 if dtype is torch.float32 else trained * dtype.itemsize
    yield Part("adapters and optimiser", together * (trained * (4 + 4 + moments) + held * dtype.itemsize + cast))
    yield Part("what clients were sent and learned", under_way * 4 * (held + trained), computing=device == "cpu", sure=False)


def kept(
    model: Any,
    targets: Sequence[str],
    form: Form,
    ask: Train,
    clients: Sequence[Sequence[np.ndarray]],
    dtype: torch.dtype,
    checkpointed: bool = False,
) -> int:
    """Bytes that autograd keeps for the backward pass of a step, each storage once, but for parameters and factors.

    Args:
        model: on the meta device; it is changed.
        ask: what each client of the step trains.
        clients: the examples of each client's batch.
        checkpointed: whether its blocks are; then what one of them keeps is added, for it is computed again.
    """
    use(model, PLAIN if form.packing is None else attention.NAME)
    model.to(dtype).eval().requires_grad_(any(slot == BASE for slot, _ in ask.roles))
    model.config.pad_token_id = None  # or some look for it among ids that are not there
    adapted = Adapted(model, targets)
    whole = _kept(adapted, form, ask, clients, dtype, ())
    if not checkpointed:
        return whole
    blocks = switch_on(adapted)
    entering = _kept(adapted, form, ask, clients, dtype, blocks)
    return entering + (whole - entering) // len(blocks)


def most_kept(shapes: Mapping[str, tuple[int, int]], heads: int, layers: int, tokens: int, longest: int, dtype: torch.dtype) -> int:
    """A bound of `kept` for the usual blocks: six numbers for each that enters or leaves an adapted layer, and four for each pair
    of tokens in each of the attention's heads."""
    sides = sum(map(sum, shapes.values()))
    return tokens * (6 * sides + 4 * heads * layers * longest) * dtype.itemsize


def _kept(
    adapted: Adapted,
    form: Form,
    ask: Train,
    clients: Sequence[Sequence[np.ndarray]],
    dtype: torch.dtype,
    blocks: Sequence[nn.Module],
) -> int:
    seen: dict[int, Tensor] = {}
    slots = {slot: _shape_of(slot, factors, ask.roles, dtype) for slot, factors in ask.slots.items()}
    live = bind(slots, list(adapted.shapes), {})
    known = [*adapted.model.parameters(), *adapted.model.buffers()]
    known += [x for factors in slots.values() for role in ROLES for x in factors.role(role).values()]
    own = {x.untyped_storage()._cdata for x in known}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            seen[x.untyped_storage()._cdata] = x
        return x

    body = Body(adapted.model, replace(form, masked=False))
    graphs = []
    for group in [[each] for each in clients] if form.apart else [clients]:
        owner = np.repeat(np.arange(len(group)), [len(each) for each in group])
        examples = [x for each in group for x in each]
        for where in sharing(form.shared, np.array([len(x) for x in examples])):
            inputs = pack([examples[i] for i in where], form, 0, torch.device("meta"), dtype)
            rows = [int(inputs.lengths[owner[where] == k].sum()) for k in range(len(group))]
            ends = pairwise(accumulate(rows, initial=0))
            spans = [slice(a, b) for a, b in ends] if len(group) > 1 else [slice(None)]
            adapted.bound = {m: [(span, own) for span in spans] for m, own in live.items() if own}
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), checkpointing(blocks) if blocks else nullcontext():
                graphs.append(body.all_tokens(replace(inputs, mask=None)))
            adapted.bound = {}
    return sum(x.untyped_storage().nbytes() for x in seen.values())


def _shape_of(slot: str, factors: Factors, roles: Collection[tuple[str, str]], dtype: torch.dtype) -> Factors:
    """A slot without values, which trains where the request says so."""
    for role in ROLES:
        moves = (slot, role) in roles
        values = {m: torch.empty(x.shape, device="meta", dtype=dtype, requires_grad=moves) for m, x in factors.role(role).items()}
        factors = factors.with_role(role, values)
    return factors


def work(shapes: Mapping[str, tuple[int, int]], tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the largest tensors that a backward pass of so many tokens has for a moment."""
    widest = max((max(shape) for shape in shapes.values()), default=0)
    return int(WORK * tokens * widest * dtype.itemsize)


def head_bytes(vocabulary: int, tokens: int, dtype: torch.dtype) -> int:
    """Of a chunk of so many tokens of a language model: logits in fp32, their gradient, and both in the precision of the pass."""
    return vocabulary * tokens * (4 + 4 + (0 if dtype is torch.float32 else 2 * dtype.itemsize))


def numbers_of(slots: Slots) -> int:
    """How many numbers slots hold."""
    return sum(x.numel() for factors in slots.values() for role in ROLES for x in factors.role(role).values())


def name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype).removeprefix("torch."))


def room(device: torch.device, root: Path = Path("/")) -> Room:
    """What there is now."""
    main = _main(root)
    return Room(torch.cuda.mem_get_info(device)[0], main) if device.type == "cuda" else Room(main)


def _main(root: Path) -> int | None:
    """Of the main memory: what the system has left, or, where that is less, what the control groups of this process leave it."""
    found = [size for size in (_of_system(root), *_of_groups(root)) if size is not None]
    return min(found, default=None)


def _of_system(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _of_groups(root: Path) -> Iterator[int]:
    """What each group around this process leaves: its limit, less what it uses and cannot give back."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, limit, usage, file = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage, file = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        inner = Path(path.strip("/"))
        for group in dict.fromkeys((inner, *inner.parents, Path("."))):  # within a container the path may be the host's
            most, used = (_number(root / base / group / name) for name in (limit, usage))
            if most is not None and used is not None:
                yield max(0, most - used + _statistic(root / base / group / "memory.stat", file))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None  # "max", or so much that it is none


def _statistic(file: Path, wanted: str) -> int:
    try:
        pairs = (line.split() for line in file.read_text().splitlines())
        return next((int(value) for key, value in pairs if key == wanted), 0)
    except (OSError, ValueError):
        return 0


def in_words(size: int) -> str:
    """ "0.3 MB", "1.24 GB", "28 GB" """
    if size < 1e9:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"
