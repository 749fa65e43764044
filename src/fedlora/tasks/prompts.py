"""What a language model is asked: questions as its training data had them, prompts of files, and conversations."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import SourceConfig
from fedlora.data import shapes, texts
from fedlora.data.conversations import Example, Message, messages, require_order
from fedlora.data.formats import kind_of, read_file
from fedlora.data.shapes import Shape
from fedlora.errors import BadInput
from fedlora.models.generate import context
from fedlora.tasks.base import Answering, Turn
from fedlora.tasks.rendering import prompt_ids

Given = str | Example  # a question as somebody asks it, or an example, of which the prompt is taken


def given(values: Sequence[Any]) -> Iterator[Given]:
    """The inputs that texts, and lists of messages, are. BadInput names the one that is none."""
    for number, value in enumerate(values, 1):
        if isinstance(value, str):
            yield from texts.arguments([value])
        else:
            turns = messages(value, f"prompt {number}")
            require_order(turns, f"prompt {number}")
            yield Example("chat", turns)


def read(path: Path, config: SourceConfig, shape: str | None) -> Iterator[Given]:
    """The prompts of a file: the lines of a .txt; of what else there is, those of the shape that is recognised, of which the
    answers may be missing. BadInput: why it cannot be read."""
    if path.is_dir() or kind_of(path) == ".txt":
        return texts.read(path, config)
    wide = shapes.widened(config)
    part = read_file(path, wide)
    return map(Example.from_json, shapes.examples(part, shapes.recognise(part, wide, shape, prompts=True)))


def shown(value: Given) -> str:
    """A prompt for people: a text as it stands, the one turn of a chat, or each of its turns behind its role."""
    if isinstance(value, str):
        return value
    if not value.messages:
        return str(value.completion if value.kind == "text" else value.prompt).rstrip("\n")
    turns = value.messages[:-1] if value.messages[-1].role == "assistant" else value.messages
    return turns[0].content if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def whole(value: Example) -> str:
    """An example for people, its answers with it."""
    if value.messages:
        return "\n".join(f"{turn.role}: {turn.content}" for turn in value.messages)
    return f"{value.prompt} {value.completion}".strip()


def shape_of(model: Answering) -> Shape:
    """The shape of the prompts that a model was trained on."""
    name, column = model.schema.prompts[model.domain or 0]
    return Shape(name, (("prompt", column),), name == "chat")


def ids_of(value: Given, model: Answering) -> np.ndarray:
    """A prompt as the model is given it, (n,); of no tokens, what texts begin with. BadInput: the model has no room for it."""
    tokenizer, room = model.pretrained.processor, context(model.pretrained.model)
    ids = prompt_ids(tokenizer, shapes.asked(shape_of(model), value) if isinstance(value, str) else value)
    if not len(ids):
        ids = np.array([tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id], dtype=np.int32)
    if room is not None and len(ids) >= room:
        raise BadInput(f"a prompt of {len(ids):,} tokens; the model takes {room:,}, its answer among them: {excerpt(shown(value))}")
    return ids


def told(turns: Sequence[Turn], question: str, model: Answering, limit: int) -> tuple[Given, int]:
    """A question at the end of a conversation, and how many of the oldest turns had to be left out, so that there is room for an
    answer of `limit` tokens."""
    room = context(model.pretrained.model)
    for dropped in range(len(turns)):
        example = conversation(turns[dropped:], question, model)
        if room is None or len(prompt_ids(model.pretrained.processor, example)) + limit <= room:
            return example, dropped
    return conversation((), question, model), len(turns)


def conversation(turns: Sequence[Turn], question: str, model: Answering) -> Example:
    """A question behind earlier turns, each as the model's training data had it: of a chat, and where it had no questions at all,
    by the chat template; else one after the other, an empty line between them."""
    shape, tokenizer = shape_of(model), model.pretrained.processor
    if shape.messages or (shape.name == "text" and tokenizer.chat_template):
        before = [Message(*each) for turn in turns for each in (("user", turn.question), ("assistant", turn.answer))]
        return Example("chat", (*before, Message("user", question)))

    def asked(text: str) -> str:
        example = shapes.asked(shape, text)
        return f"{example.completion}\n" if example.kind == "text" else str(example.prompt)

    return Example("completion", "", "".join(f"{asked(turn.question)}{turn.answer}\n\n" for turn in turns) + asked(question))


def pieces(decode: Callable[[np.ndarray], str], hear: Callable[[str], None]) -> Callable[..., None]:
    """Tells `hear` what each token adds to the text of those before it: all together, and the `whole` at the end, are the text."""
    said = ""

    def told(ids: np.ndarray, whole: bool = False) -> None:
        nonlocal said
        text = decode(ids) if whole else decode(ids).rstrip("\ufffd")  # which may be the first bytes of a character
        if len(text) > len(said):
            hear(text[len(said) :])
            said = text

    return told


def excerpt(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
