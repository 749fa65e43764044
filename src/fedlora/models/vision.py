"""Classifiers of images: from a local folder or the Hugging Face Hub, or drawn from the seed; and how they are run.

A model from the Hub has its own size, channels and numbers (see `processor`); one that is drawn from the seed, those of the data.
Weights are drawn with variance 1 / (inputs of the layer), embeddings with variance 1, each parameter by its name.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.config import ModelConfig
from fedlora.errors import BadInput, first_line, some
from fedlora.models.heads import logits
from fedlora.models.load import PACKAGED, Given, Pretrained, classifier, draw_anew, locate, public_name, taken
from fedlora.models.packing import Form, Shared, pack
from fedlora.models.quantised import refuse_quantised
from fedlora.models.quiet import quiet
from fedlora.models.trial import CLOSE, CLOSE_ROWS, Calls, Findings, close, use, used, watch

Shape = tuple[int, ...]  # channels, height, width
PATCHES = 8  # of a vit-tiny, on the longer side
IMAGES = 4  # made-up ones, of a trial

# ---- loading -----------------------------------------------------------------------------------------------------------


def load(
    config: ModelConfig, labels: Sequence[str], shape: Shape, seed: int, size: int | None, given: Given | None = None
) -> Pretrained:
    """The classifier of a run.

    Args:
        shape: of the data's images; empty where they differ in size.
        size: pixels of a side that the model shall be given, where it is not its own size.
        given: the model, where it is at hand.

    Raises:
        BadInput: there is no such model, or it cannot be reached; it is no classifier of images; its checkpoint lacks weights or
            has them in other sizes; it is to be drawn, and images differ in size.
    """
    key = f"model.source = '{config.source}'"
    if config.source in PACKAGED:
        raise BadInput(f"{key}: this is a model of texts; {', '.join(SCRATCH)}, a local folder or a Hub id of images is needed")
    refuse_quantised(key, config.quantise)
    known = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}
    if config.source in SCRATCH:
        return _drawn(config.source, known, shape, seed)
    read = partial(_read, config.source) if given is None else partial(taken, key, given, _kinds())
    own, model, lacks = classifier(key, read, {**known, "problem_type": "single_label_classification"})
    drawn = draw_anew(key, model, lacks, seed)
    notes = (f"the checkpoint lacks {some(drawn, 4)}: drawn from the seed, and saved with the adapter",) if drawn else ()
    processor = _like(own, model.config, size)
    source = public_name(config.source) if given is None else given.public_name
    return Pretrained(_still(model), processor, source, drawn, notes, peft_task=None)


def _read(source: str, how: Mapping[str, Any]) -> tuple[Any, Any, Mapping[str, Any]]:
    """Image processor, model and what loading said of it, from a folder or the Hub."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    place = locate(source, SCRATCH)
    return (AutoImageProcessor.from_pretrained(place), *AutoModelForImageClassification.from_pretrained(place, **how))


def _kinds() -> Mapping[Any, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    kinds: Mapping[Any, Any] = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return kinds


def outline(config: ModelConfig, labels: Sequence[str], shape: Shape) -> Pretrained:
    """The modules and parameters of the same classifier, without values. BadInput: see `load`."""
    from transformers import AutoConfig, AutoModelForImageClassification

    key = f"model.source = '{config.source}'"
    try:
        with torch.device("meta"):
            if config.source in SCRATCH:
                return Pretrained(SCRATCH[config.source](_checked(config.source, shape), len(labels)), None, "", peft_task=None)
            found = AutoConfig.from_pretrained(locate(config.source, SCRATCH), num_labels=len(labels))
            return Pretrained(AutoModelForImageClassification.from_config(found), None, "", peft_task=None)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{key}: {first_line(error)}") from error


def shape_of(pretrained: Pretrained) -> Shape:
    """Of an image as the model takes it."""
    size = pretrained.processor.size
    return len(pretrained.processor.image_mean), size["height"], size["width"]


def _still(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def _like(own: Any, config: Any, size: int | None) -> Any:
    """The processor of a model as this package runs it: images are stretched to one size, where another one may crop them."""
    channels = int(getattr(config, "num_channels", 3))
    sides = next(filter(None, map(_sides, (size, getattr(config, "image_size", None), *_sizes(own)))), (224, 224))
    normal = getattr(own, "do_normalize", True) and own.image_mean
    mean, std = (own.image_mean, own.image_std) if normal else ([0.0], [1.0])
    mean, std = ([x[i % len(x)] for i in range(channels)] for x in (list(mean), list(std)))
    return processor(sides, mean, std, int(getattr(own, "resample", None) or 2))


def _sizes(own: Any) -> Iterator[Any]:
    """What a processor says of sizes, what it crops to first."""
    for name in ("crop_size", "size"):
        found = getattr(own, name, None)
        if found:
            get = found.get if hasattr(found, "get") else lambda key, found=found: getattr(found, key, None)
            yield (get("height"), get("width")) if get("height") else get("shortest_edge")


def _sides(size: Any) -> tuple[int, int] | None:
    return None if not size else (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def processor(sides: tuple[int, int], mean: Sequence[float], std: Sequence[float], resample: int = 2) -> Any:
    """An image processor of transformers that stretches images to one height and width, and makes (x / 255 - mean) / std of them,
    by channel: one is grey."""
    import transformers

    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor  # what needs no torchvision
    size = {"height": sides[0], "width": sides[1]}
    return kind(size=size, image_mean=list(mean), image_std=list(std), resample=resample, do_convert_rgb=len(mean) == 3)


# ---- models that are drawn from the seed ---------------------------------------------------------------------------------


def _vit_tiny(shape: Shape, labels: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    channels, height, width = shape
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=height if height == width else (height, width),
        patch_size=min(height, width, max(2, -(-max(height, width) // PATCHES))),
        num_channels=channels,
        num_labels=labels,
    )
    return ViTForImageClassification(config)


def _mlp(shape: Shape, labels: int) -> Any:
    from fedlora.models.mlp import MLPConfig, MLPForImageClassification

    return MLPForImageClassification(MLPConfig(num_channels=shape[0], image_size=tuple(shape[1:]), num_labels=labels))


SCRATCH: Mapping[str, Callable[[Shape, int], Any]] = {"mlp": _mlp, "vit-tiny": _vit_tiny}


def _checked(name: str, shape: Shape) -> Shape:
    if not shape:
        raise BadInput(f"model.source = '{name}': it takes the size of the images, and these differ; task.size = 32 stretches them")
    return shape


def _drawn(name: str, known: Mapping[str, Any], shape: Shape, seed: int) -> Pretrained:
    channels, *sides = _checked(name, shape)
    with quiet(), torch.random.fork_rng():
        model = SCRATCH[name](shape, known["num_labels"])
    model.config.id2label, model.config.label2id = known["id2label"], known["label2id"]
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            owner = model.get_submodule(path.rpartition(".")[0])
            if parameter.ndim < 2:
                parameter.fill_(0.0 if path.endswith("bias") else 1.0)
                continue
            inputs = math.prod(parameter.shape[1:]) if isinstance(owner, nn.Linear | nn.Conv2d) else 1
            drawn = seeds.generator(seed, "from scratch", path).normal(0.0, inputs**-0.5, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn))
    own = processor((sides[0], sides[1]), [0.5] * channels, [0.5] * channels)
    notes = (f"{name} is drawn from the seed, with no training behind it",)
    return Pretrained(_still(model), own, "", notes=notes, peft_task=None)


# ---- how a model is run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What images gave, (images, classes), and what each layer was given."""

    logits: Tensor
    calls: Calls


def try_model(model: Any, targets: Sequence[str], shape: Shape) -> Findings:
    """Try a model, in evaluation mode, on made-up images: each alone, then together. Where each adapted layer is given the same
    number of rows for every image, image by image, clients can share a pass; elsewhere a pass holds one client.

    Args:
        targets: the adapted layers that are wished for.
        shape: of an image.

    Raises:
        BadInput: the model does not take such images, or answers them in another way beside others, or no target is a linear layer
            of the forward pass.
    """
    name = type(model).__name__
    images = list(np.random.default_rng(0).standard_normal((IMAGES, *shape), dtype=np.float32))
    with torch.no_grad(), quiet():
        use(model, "eager")  # on a CPU the backward pass of the fused one is several times slower
        form = Form(Shared.STACKED, masked=False, split=False, shape=tuple(shape), rows=1)
        try:
            alone = [_run(model, targets, form, [image]) for image in images]
        except Exception as error:  # whatever a model raises over an image that it cannot take
            raise BadInput(f"{name} does not take an image of {' x '.join(map(str, shape))}: {first_line(error)}") from error
        own, dropped = used(model, targets, [seen.calls for seen in alone], "an image")
        if targets and not own:
            raise BadInput(f"model.target_modules: {some(targets)} {dropped[targets[0]]}, so there is nothing to adapt")
        counts = Counter(len(call) for m in own for call in alone[0].calls[m] if call is not None)
        rows = counts.most_common(1)[0][0] if counts else 1
        wanted = torch.cat([seen.logits for seen in alone])
        for split in (True, False):
            form = Form(Shared.STACKED, masked=False, split=split, shape=tuple(shape), rows=rows)
            together = _tried(model, targets, form, images, wanted)
            if together is not None:
                break
        else:
            raise BadInput(f"{name} answers an image in another way beside others, or each time, so it cannot be trained here")
    others = [m for m in own if not _in_order(m, rows, alone, together)]
    form = Form(Shared.STACKED, None, False, False, split, bool(others), tuple(shape), rows)
    return Findings(form, tuple(own), rows, rows, tuple(_notes(name, others, rows, dropped)))


def _run(model: Any, targets: Sequence[str], form: Form, images: Sequence[np.ndarray]) -> _Seen:
    parameter = next(model.parameters())
    with watch(model, targets) as calls:
        return _Seen(logits(model, form, pack(images, form, 0, parameter.device, parameter.dtype)), calls)


def _tried(model: Any, targets: Sequence[str], form: Form, images: Sequence[np.ndarray], wanted: Tensor) -> _Seen | None:
    """Images together; None where they do not give what they give alone."""
    try:
        seen = _run(model, targets, form, images)
    except Exception:  # a head that reads more than its body's hidden states
        return None
    return seen if seen.logits.shape == wanted.shape and close(seen.logits, wanted, CLOSE) else None


def _in_order(module: str, rows: int, alone: Sequence[_Seen], together: _Seen) -> bool:
    """Whether a layer was given so many rows for each image, in every call, and together those of each alone, in order."""
    for i, given in enumerate(together.calls[module]):
        each = [seen.calls[module][i] for seen in alone if len(seen.calls[module]) > i]
        parts = [call for call in each if call is not None and len(call) == rows]
        if given is None or len(parts) != len(alone) or len(given) != rows * len(alone):
            return False
        if not close(given, torch.cat(parts), CLOSE_ROWS):
            return False
    return len(together.calls[module]) > 0


def _notes(name: str, others: Sequence[str], rows: int, dropped: Mapping[str, str]) -> Iterator[str]:
    if others:
        yield (
            f"{name} gives {some(others)} other rows than {rows} an image, so each client has a pass of its own: "
            "right as well, but slower"
        )
    for reason in dict.fromkeys(dropped.values()):
        yield f"{name}: {some([m for m, why in dropped.items() if why == reason])} {reason}, so no adapter is put on it"
