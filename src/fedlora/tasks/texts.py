"""What tasks on texts share: tokens, how a model takes them, and what stands beside an exported one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedlora.config import ModelConfig, SourceConfig
from fedlora.data import load as sources
from fedlora.data import texts
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.encoded import Encoded
from fedlora.data.partition import Parts
from fedlora.data.source import Source
from fedlora.errors import BadInput
from fedlora.models import gguf
from fedlora.models.heads import padding
from fedlora.models.load import Pretrained, outline
from fedlora.models.trial import Findings, try_model
from fedlora.names import part_of
from fedlora.tasks.base import Answer, Result, Survey


class TextTask:
    """Base of the tasks whose inputs are texts."""

    INPUT: ClassVar[str] = "text"
    WRITES: ClassVar[bool] = False
    COLUMNS: ClassVar[tuple[str, ...]] = ("text", "label")
    FOUND: ClassVar[tuple[str, ...]] = ()
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    TOKENS: ClassVar[bool] = False  # whether the model says what follows each token

    def find(self, config: SourceConfig) -> Source:
        return sources.find(config)

    def dealt(self, dataset: Dataset, parts: Parts) -> Dataset:
        return dataset

    def try_model(self, pretrained: Pretrained, targets: Sequence[str], limit: int) -> Findings:
        tokenizer = pretrained.processor
        if tokenizer is None:
            return try_model(pretrained.model, targets, limit, tokens=self.TOKENS)
        allowed = min(limit, tokenizer.model_max_length)
        fewest = max(1, tokenizer.num_special_tokens_to_add())
        findings = try_model(
            pretrained.model, targets, allowed, len(tokenizer), tokenizer.all_special_ids, fewest, tokens=self.TOKENS
        )
        if allowed == limit:
            return findings
        cut = f"data.max_length = {limit} is above the {allowed} tokens that the tokenizer allows; using {allowed}"
        return replace(findings, notes=(cut, *findings.notes))

    def fitting(self, dataset: Dataset, pretrained: Pretrained, limit: int) -> Dataset:
        return dataset

    def survey(self, dataset: Dataset, config: ModelConfig, limit: int) -> Survey | None:
        return None

    def encode(self, pretrained: Pretrained, split: Split, limit: int) -> Encoded:
        return replace(encode(pretrained.processor, split.inputs, split.targets, limit), domains=split.domains)

    def notes(self, train: Encoded, test: Encoded, limit: int) -> Iterator[str]:
        unknown = (
            f"{100 * train.unknown:.0f} % of the training texts' tokens are unknown to the tokenizer, or it finds none in a text"
        )
        if train.unknown > 0.99:
            raise BadInput(f"{unknown}: it is not this model's, or not for texts like these, and nothing can be learned")
        if train.unknown > 0.25:
            yield unknown
        for name, part in (("training", train), ("test", test)):
            if part.cut:
                yield f"{part_of(part.cut, len(part), f'{name} text')} longer than {limit} tokens, and cut"

    def inputs(self, given: Sequence[Any]) -> Iterator[Any]:
        return texts.arguments(given)

    def read_inputs(self, path: Path, config: SourceConfig) -> Iterator[Any]:
        return texts.read(path, config)

    def read_lines(self, raw: Iterable[bytes], where: str) -> Iterator[str]:
        return texts.lines(raw, where)

    def shown(self, given: Any) -> str:
        return str(given)

    def known(self, given: Any) -> Answer:
        return {}

    def save_processor(self, pretrained: Pretrained, limit: int, padding: str, folder: Path) -> None:
        tokenizer = pretrained.processor
        tokenizer.model_max_length, tokenizer.padding_side = limit, "left" if padding == "left" else "right"
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # what the model was given in training
        tokenizer.save_pretrained(folder)

    def outline(self, config: ModelConfig, schema: Schema) -> Pretrained:
        return outline(config, len(schema.label_names) or 1)


def how_to_use(result: Result, problem: str, arguments: str, last: str) -> list[str]:
    """Lines of Python that use an exported folder.

    Args:
        problem: the end of the model's auto class, "SequenceClassification".
        arguments: of loading an adapter, what its base is told besides.
        last: the line that prints what `logits` say.
    """
    given, padded = ('["a text", "another"]', ", padding=True") if result.padding != "none" else ('["a text"]', "")
    return [
        *loading(result, problem, arguments),
        *([] if result.merged else ["model.config.get_text_config().pad_token_id = tokenizer.pad_token_id"]),
        f'logits = model(**tokenizer({given}, truncation=True{padded}, return_tensors="pt")).logits',
        last,
    ]


def loading(result: Result, problem: str, arguments: str = "") -> list[str]:
    """Lines of Python that load an exported folder: `model` and `tokenizer`. Its base's path is in adapter_config.json alone."""
    told, here = ", ".join(x for x in (arguments, "dtype='float32'") if x), 'folder = "."  # this folder'
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(folder)"
    if result.merged:
        imports = f"from transformers import AutoModelFor{problem}, AutoTokenizer"
        return [imports, here, f"model = AutoModelFor{problem}.from_pretrained(folder, dtype='float32').eval()", tokenizer]
    if not result.pretrained.source.lower().endswith(gguf.SUFFIX):
        imports = f"from peft import AutoPeftModelFor{problem}"
        model = f"model = AutoPeftModelFor{problem}.from_pretrained(folder, {told}).eval()"
        return [imports, "from transformers import AutoTokenizer", here, model, tokenizer]
    return [  # PEFT has no way to load a base from a GGUF file
        "import json",
        "from pathlib import Path",
        "from peft import PeftModel",
        f"from transformers import AutoModelFor{problem}, AutoTokenizer, GgufConfig",
        here,
        'named = json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]',
        f"file = Path(named)  # or where your {Path(result.pretrained.source).name} is",
        "plain = GgufConfig(dequantize=True)",
        f"base = AutoModelFor{problem}.from_pretrained(",
        f"    file.parent, gguf_file=file.name, quantization_config=plain, {told}",
        ")",
        "model = PeftModel.from_pretrained(base, folder).eval()",
        tokenizer,
    ]


def on_padding(result: Result) -> str:
    """How texts may be padded for an exported model, in a paragraph."""
    if result.padding == "none":
        return "Padding: this model is changed by padding, so give it one text at a time."
    token, id = result.pretrained.processor.pad_token, padding(result.pretrained.model)
    return (
        f"Padding: this folder's tokenizer pads with `{token}` (id {id}). A decoder's head reads a text's last token that is not "
        "the padding token, so give the model the same `pad_token_id`, as above."
    )


def fields(result: Result) -> dict[str, Any]:
    """What fedlora.json says of an exported model's texts."""
    return {
        "max_length": result.limit,
        "pad_token_id": padding(result.pretrained.model),
        "padding_side": result.padding,
    }


def encode(tokenizer: Any, texts: Sequence[str], targets: np.ndarray, max_length: int) -> Encoded:
    """Token ids of every text, cut at `max_length` tokens. A text of no tokens is its tokenizer's end-of-text token.

    Raises:
        BadInput: `max_length` leaves no room for a text beside what the tokenizer adds.
    """
    added = tokenizer.num_special_tokens_to_add()
    if max_length <= added:
        raise BadInput(f"data.max_length = {max_length}: the tokenizer adds {added} tokens to every text; give {added + 1} or more")
    rows: list[np.ndarray] = []
    nothing = np.array([_nothing(tokenizer)], dtype=np.int32)
    cut = 0
    for start in range(0, len(texts), 1024):  # by pieces: the tokenizer's own objects are much larger than the ids
        piece = list(texts[start : start + 1024])
        part = tokenizer(piece, truncation=True, max_length=max_length, return_attention_mask=False)
        own = [np.asarray(ids, dtype=np.int32) for ids in part["input_ids"]]
        full = [i for i, ids in enumerate(own) if len(ids) == max_length]
        cut += sum(_is_cut(tokenizer, part, piece[i], i, max_length) for i in full)
        rows.extend(ids if len(ids) else nothing for ids in own)
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    return Encoded(tuple(rows), targets, sizes, cut=cut, unknown=_unknown(tokenizer, rows))


def _nothing(tokenizer: Any) -> int:
    """What stands for a text of no tokens."""
    named = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return next((int(id) for id in named if id is not None), 0)


def _is_cut(tokenizer: Any, part: Any, text: str, place: int, max_length: int) -> bool:
    if part.encodings is not None:
        return bool(part.encodings[place].overflowing)
    return len(tokenizer(text)["input_ids"]) > max_length


def _unknown(tokenizer: Any, rows: Sequence[np.ndarray]) -> float:
    """The share of unknown tokens among those of the texts themselves; a text that has none counts as one."""
    if not rows:
        return 0.0
    added = [id for id in tokenizer.all_special_ids if id != tokenizer.unk_token_id]
    tokens = np.concatenate(rows)
    own = ~np.isin(tokens, added)
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    nothing = int((np.add.reduceat(own, starts, dtype=np.int64) == 0).sum())
    strange = 0 if tokenizer.unk_token_id is None else int((tokens == tokenizer.unk_token_id).sum())
    return (strange + nothing) / (int(own.sum()) + nothing)
