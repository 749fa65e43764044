"""Tokenizers for chats: the bytes of a text, and special tokens."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

VERSION = "1.16.0"  # as scripts/setup has it
PLACE = Path(__file__).parents[1] / ".venv" / f"trl-{VERSION}" / "trl" / "chat_templates"
SPECIAL = re.compile(r"<\|[^>|<' ]*\|>|<｜[^>]*?｜>|<(?:start|end)_of_(?:turn|utterance)>|<turn\|>|<\|turn>|\[/?INST\]")

CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' + turn['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes the system's text before the last turn, if that is the user's, and refuses turns that do not take turns.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for turn in rest %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate!') }}{% endif %}"
    "{% if turn['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + turn['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + turn['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Has a system turn of its own where none is given, and no end of a turn but a line.
FORCED = (
    "{% if messages[0]['role'] != 'system' %}{{ 'SYSTEM: Be kind.\n' }}{% endif %}"
    "{% for turn in messages %}{{ turn['role'] | upper + ': ' + turn['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def template(name: str) -> str:
    """A template of trl's, which stock ones there are as models have them, and as trl marks them for training (*_training)."""
    own = {"chatml": CHATML, "mistral": MISTRAL, "forced": FORCED}
    return own[name] if name in own else (PLACE / f"{name}.jinja").read_text(encoding="utf-8")


def stock() -> list[str]:
    """The names of trl's templates that models have."""
    return sorted(file.stem for file in PLACE.glob("*.jinja") if not file.stem.endswith("_training"))


def tokenizer(chat: str | None = None, merges: Sequence[tuple[str, str]] = (), bos: bool = False, **settings: Any) -> Any:
    """Each byte is a token, but for `merges` and special tokens; padded with its end-of-text token.

    Args:
        chat: the chat template.
        bos: whether it begins texts with its <s>.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*alphabet, *map("".join, merges)])}
    words = Tokenizer(BPE(vocabulary, list(merges)))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | settings
    tokens = [
        AddedToken(each, special=True, normalized=False) for each in dict.fromkeys((*named.values(), *SPECIAL.findall(chat or "")))
    ]
    words.add_special_tokens(tokens)
    # Offsets without spaces, as GPT-2's tokenizer has them.
    trimmed = processors.ByteLevel(trim_offsets=True)
    first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.token_to_id("<s>"))])
    words.post_processor = processors.Sequence([trimmed, first]) if bos else trimmed
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=10**6, **named)
    made.chat_template = chat
    return made


class Slow(transformers.PreTrainedTokenizer):  # type: ignore[misc]
    """Each character is a token, but "bc" is one; without offsets."""

    def __init__(self, **settings: Any) -> None:
        self.known = {token: at for at, token in enumerate(["bc", *map(chr, range(10, 127))])}
        super().__init__(**settings)

    @property
    def vocab_size(self) -> int:
        return len(self.known)

    def get_vocab(self) -> dict[str, int]:
        return self.known | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return re.findall(r"bc|.", text, re.DOTALL)

    def _convert_token_to_id(self, token: str) -> int:
        return self.known[token]

    def _convert_id_to_token(self, index: int) -> str:
        return next(token for token, at in self.known.items() if at == index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def marked(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Ids, and which of them are trained, of a text in which that stands between « and »: each piece for itself."""
    ids: list[int] = []
    trained: list[bool] = []
    for at, piece in enumerate(re.split("[«»]", text)):
        own = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        ids += own
        trained += [at % 2 == 1] * len(own)
    return ids, trained


def same(rendered: Any, expected: tuple[list[int], list[bool]]) -> bool:
    assert rendered.ids.dtype == np.int32 and rendered.trained.dtype == np.bool_
    return (rendered.ids.tolist(), rendered.trained.tolist()) == expected
