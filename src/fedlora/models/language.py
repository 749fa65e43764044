"""Pre-trained causal language models: by packaged name, local folder, GGUF file or Hugging Face Hub id.

Such a model keeps the head that it was trained with: it is a part of the base, nothing of it is drawn and none of it travels.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fedlora.config import HeadMode, ModelConfig
from fedlora.errors import BadInput, NoModel
from fedlora.models import quantised
from fedlora.models.load import (
    Given,
    Pretrained,
    locate,
    not_whole,
    public_name,
    read_model,
    refuse_encoder_decoder,
    refuse_other_sizes,
    refuse_other_vocabulary,
    remarks,
    said_of,
    set_padding,
    taken,
    without_values,
)
from fedlora.models.quiet import quiet
from fedlora.models.trial import rows_of_embedding

NEEDED = "a decoder such as HuggingFaceTB/SmolLM2-135M-Instruct"
TRIED = 6  # tokens, of which the last one is changed to see whether those before it notice
NOTICED = 0.01  # of the largest logit; where tokens do not see what comes after them, the difference is rounding


def load(config: ModelConfig, seed: int, given: Given | None = None, dtype: torch.dtype | None = None) -> Pretrained:
    """The language model of a run. Nothing is drawn, so the seed says nothing.

    Args:
        given: the model, where it is at hand.
        dtype: with torch.bfloat16 its parameters are in bf16, as the base of such a model usually is; else in fp32.

    Raises:
        BadInput: there is no such model, or it cannot be reached; it is no decoder; its checkpoint has no language model's head,
            lacks other weights or has them in other sizes; it has no tokenizer, or one of a larger vocabulary; its head is to be
            trained.
    """
    key = f"model.source = '{config.source}'"
    if config.head is not HeadMode.FROZEN:
        raise BadInput(f"model.head = '{config.head.value}': a language model keeps its own head; only frozen is possible")
    kept = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    read = partial(_read, key, config, kept) if given is None else partial(_taken, key, config, kept, given)
    tokenizer, model, info = read_model(key, read, {"dtype": kept})
    if quantised.bits(model) is not None:
        quantised.compute_in(quantised.move(model, torch.device("cpu")), kept)
    refuse_other_sizes(key, info["mismatched_keys"])
    _refuse_encoder(key, model)
    _refuse_missing(key, model, set(info["missing_keys"]))
    refuse_other_vocabulary(key, model, tokenizer)
    set_padding(model, tokenizer)
    model.eval().requires_grad_(False)
    said, source = ((), given.public_name) if given is not None else (said_of(config.source), public_name(config.source))
    return _pretrained(model, tokenizer, source, (*said, *remarks(model, tokenizer)))


def without_model(config: ModelConfig) -> Pretrained:
    """The tokenizer alone. NoModel: there is none."""
    from transformers import AutoTokenizer

    key = f"model.source = '{config.source}'"
    try:
        tokenizer, _, _ = read_model(key, lambda how: (AutoTokenizer.from_pretrained(locate(config.source)), None, {}), {})
    except BadInput as error:
        raise NoModel(str(error)) from error
    return Pretrained(None, tokenizer, public_name(config.source), peft_task="CAUSAL_LM", keeps_head=True)


def outline(config: ModelConfig) -> Pretrained:
    """The modules and parameters of a language model, without values, by its configuration alone. BadInput: see `load`."""
    from transformers import AutoModelForCausalLM

    def build(hf_config: Any) -> Pretrained:
        _refuse_unfit(f"model.source = '{config.source}'", hf_config)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        return _pretrained(model.eval().requires_grad_(False), None, "")

    return without_values(config.source, build)


def _pretrained(model: Any, tokenizer: Any, source: str, notes: tuple[str, ...] = ()) -> Pretrained:
    return Pretrained(model, tokenizer, source, notes=notes, peft_task="CAUSAL_LM", keeps_head=True)


def _read(key: str, config: ModelConfig, dtype: torch.dtype, how: Mapping[str, Any]) -> tuple[Any, Any, Mapping[str, Any]]:
    """Tokenizer, model and what loading said of it, from a folder or the Hub."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = locate(config.source)
    hf_config = AutoConfig.from_pretrained(source)
    _refuse_unfit(key, hf_config)
    how = {**how, **quantised.arguments(key, config.quantise, hf_config, dtype)}
    return (AutoTokenizer.from_pretrained(source), *AutoModelForCausalLM.from_pretrained(source, **how))


def _taken(
    key: str, config: ModelConfig, dtype: torch.dtype, given: Given, how: Mapping[str, Any]
) -> tuple[Any, Any, Mapping[str, Any]]:
    """The same of a model that is at hand."""
    _refuse_unfit(key, given.model.config)
    own = quantised.of_checkpoint(given.model.config)
    if own is not None:
        raise BadInput(f"{key}: this model is quantised ({own}); give it unquantised, with model.quantise, or name its folder")
    told = quantised.arguments(key, config.quantise, given.model.config, dtype)
    processor, model, info = taken(key, given, _kinds(), {**how, **told})
    own_config = getattr(given.model, "generation_config", None)  # a body alone has none
    if own_config is not None:
        model.generation_config = copy.deepcopy(own_config)
    return processor, model, info


def _kinds() -> Mapping[Any, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kinds: Mapping[Any, Any] = MODEL_FOR_CAUSAL_LM_MAPPING
    return kinds


def _refuse_unfit(key: str, hf_config: Any) -> None:
    """BadInput for a configuration of which transformers makes no language model, or one of an encoder and a decoder."""
    refuse_encoder_decoder(key, hf_config, NEEDED)
    if type(hf_config) not in _kinds():
        raise BadInput(f"{key}: transformers makes no language model of a {hf_config.model_type}; {NEEDED} is needed")


def _refuse_encoder(key: str, model: Any) -> None:
    """BadInput where tokens see what comes after them. transformers has language models of encoders, too, which do."""
    rows = rows_of_embedding(model) or TRIED + 1
    ids = torch.arange(TRIED) % rows
    other = torch.cat((ids[:-1], (ids[-1:] + 1) % rows))
    with quiet(), torch.no_grad():
        one, two = (model(input_ids=x[None]).logits[0, :-1].float() for x in (ids, other))
    if (one - two).abs().max() > NOTICED * one.abs().max():
        raise BadInput(
            f"{key}: the tokens of {type(model).__name__} see those that come after them: an encoder; {NEEDED} is needed"
        )


def _refuse_missing(key: str, model: Any, names: set[str]) -> None:
    missing = [name for name, _ in model.named_parameters() if name in names]
    if not missing:
        return
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    if all(id(model.get_parameter(name)) in head for name in missing):
        was = ", ".join(model.config.architectures or ())
        kind = f"it is one of a {was}" if was else "it is a classifier's, or a body alone"
        raise BadInput(f"{key}: the checkpoint lacks a language model's head ({', '.join(missing)}); {kind}")
    raise not_whole(key, model, missing, missing[0])
