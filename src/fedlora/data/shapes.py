"""The shapes of a language model's data: from the columns of a table to examples.

| shape | columns | learned |
|---|---|---|
| chat | messages, or conversations as ShareGPT has them | the assistant's turns |
| choices | choices; question or prompt; answer, label or completion | the right choice |
| prompt-completion | prompt and completion, both texts or both lists of messages | the completion |
| alpaca | instruction, output and perhaps input | the output, behind Stanford's prompt |
| prompt-completion | question and answer; query and response | the completion |
| text | text | all of it |

Where several fit, the first of this table is taken: what says more of an example stands higher (Stanford's own file has a column
`text` beside the three). The keys [data] prompt, completion, messages, choices and text, where they name a column, come first, and
the shape can be named.

Prompt and completion are joined as they stand where their columns are called so: who writes such a pair writes the space between,
too. Questions of other columns get a line break at their end where they end in no space, as GSM8K's own code gives them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.config import SourceConfig
from fedlora.data import columns
from fedlora.data.conversations import Example, Message, listed, messages, require_order
from fedlora.data.source import Part
from fedlora.errors import BadInput, some, unknown

CHATS = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("question", "answer"), ("query", "response"))
QUESTIONS = ("question", "prompt")
ANSWERS = ("answer", "label", "completion")
NAMES = ("chat", "choices", "prompt-completion", "alpaca", "text")
COLUMNS = tuple(
    dict.fromkeys((*CHATS, *(x for pair in PAIRS for x in pair), "choices", *ANSWERS, "instruction", "input", "output"))
)

# Word for word as train.py of Stanford Alpaca has them, with nothing between the colon and the output.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Shape:
    """A recognised shape.

    Attributes:
        name: one of NAMES.
        columns: (what it is, the column's name), such as (("prompt", "question"), ("completion", "answer")).
        messages: whether its prompts are lists of messages.
    """

    name: str
    columns: tuple[tuple[str, str], ...]
    messages: bool = False

    def __str__(self) -> str:
        same = all(what == column for what, column in self.columns)
        told = [column if same else f"{what}: {column}" for what, column in self.columns]
        return f"{self.name} ({', '.join(told)}{'; messages' if self.messages and self.name != 'chat' else ''})"

    def column(self, what: str) -> str:
        """The column of the prompts, completions and so on; empty where the shape has none."""
        return dict(self.columns).get(what, "")


def widened(config: SourceConfig) -> SourceConfig:
    """The source, read with every column that a shape may need."""
    own = (config.prompt, config.completion, config.messages, config.choices)
    return replace(config, nested=(*COLUMNS, *(name for name in own if name is not None)))


def recognise(part: Part, config: SourceConfig, name: str | None = None, prompts: bool = False) -> Shape:
    """The shape of a table's examples; `name` is asked for where it is given. With `prompts`, the answers may be missing.

    Raises:
        BadInput: a column that the configuration names is missing, or no shape fits: which columns there are, what is possible.
    """
    if name is not None and name not in NAMES:
        raise unknown("shape", name, NAMES)
    held = part.table.column_names
    possible = [shape for shape in _possible(config) if name in (None, shape.name)]
    if prompts:
        possible += [replace(shape, columns=shape.columns[:1]) for shape in possible if len(shape.columns) > 1]
    for key in ("prompt", "messages") if prompts else ("prompt", "completion", "messages", "choices"):
        own = getattr(config, key)
        if own is not None:
            columns.find(part, own, f"data.{key}")
    shape = next((shape for shape in possible if all(held.count(column) == 1 for _, column in shape.columns)), None)
    if shape is None:
        have = some([f"'{column}'" for column in held], shown=8) or "no columns"
        told = "; ".join(dict.fromkeys(" and ".join(column for _, column in shape.columns) for shape in possible))
        keys = "data.text, data.prompt with data.completion, data.messages or data.choices name others"
        wanted = f"for the shape {name}" if name else "for examples of a language model"
        raise BadInput(f"{part.where}: no columns {wanted}; it has {have}; possible: {told or 'none'}; {part.hint or keys}")
    if shape.name == "alpaca" and "input" in held:
        return replace(shape, columns=(*shape.columns[:1], ("input", "input"), *shape.columns[1:]))
    if shape.name in ("prompt-completion", "choices"):
        values = columns.entries(part, shape.column("prompt"), "data.prompt")
        return replace(shape, messages=_are_messages(values))
    return replace(shape, messages=shape.name == "chat")


def _possible(config: SourceConfig) -> list[Shape]:
    """The shapes that may be, those that are taken first standing first."""

    def choices(question: str, given: str, answer: str) -> Shape:
        return Shape("choices", (("prompt", question), ("choices", given), ("completion", answer)))

    def pair(prompt: str, completion: str) -> Shape:
        return Shape("prompt-completion", (("prompt", prompt), ("completion", completion)))

    text = Shape("text", (("text", config.text),))
    questions = QUESTIONS if config.prompt is None else (config.prompt,)
    answers = ANSWERS if config.completion is None else (config.completion,)
    multiple = [choices(x, config.choices or "choices", y) for x in questions for y in answers]
    if config.messages is not None:
        return [Shape("chat", (("messages", config.messages),))]
    if config.choices is not None:
        return multiple
    if config.prompt is not None and config.completion is not None:
        return [pair(config.prompt, config.completion)]
    if config.text != "text":
        return [text]
    alpaca = Shape("alpaca", (("instruction", "instruction"), ("output", "output")))
    chats = [Shape("chat", (("messages", column),)) for column in CHATS]
    return [*chats, *multiple, pair(*PAIRS[0]), alpaca, *(pair(*each) for each in PAIRS[1:]), text]


def _are_messages(values: Sequence[Any]) -> bool:
    """Whether a column's first value is a list of messages, or JSON text of one."""
    items = listed(next((value for value in values if value is not None), None))
    return bool(items) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items or ())


# ---- examples ----------------------------------------------------------------------------------------------------------


def examples(part: Part, shape: Shape) -> tuple[str, ...]:
    """The examples of a table's rows, (n,), each as its canonical JSON. A text that is missing is empty: such a row cannot train,
    which is found out when it is rendered.

    Raises:
        BadInput: a column is missing, or a value is not what the shape needs: the file, column, row, and turn of a chat.
    """
    named = {what: columns.entries(part, column, f"data.{what}") for what, column in shape.columns}
    if shape.name == "choices":
        if len(named) == 1:  # prompts alone
            return examples(part, replace(shape, name="prompt-completion"))
        named = {"prompt": named["prompt"], "right": tuple(_right(part, shape, named))}
    make: Callable[..., Example] = MAKERS[shape.name]
    made = (make(part, shape, row, *each) for row, each in enumerate(zip(*named.values(), strict=True)))
    return tuple(example.to_json() for example in made)


def asked(shape: Shape, question: str) -> Example:
    """The example that a question is which somebody asks a model of such data: without an answer."""
    if shape.messages:
        return Example("chat", (Message("user", question),))
    if shape.name == "alpaca":
        return Example("completion", "", ALPACA.format(instruction=question))
    return Example("text", question) if shape.name == "text" else Example("completion", "", _question(shape, question))


def _place(part: Part, shape: Shape, what: str, row: int) -> str:
    return f"{part.where}: column '{shape.column(what)}', {part.place(row)}"


def _words(part: Part, shape: Shape, what: str, row: int, value: Any) -> str:
    """A text, empty where there is none."""
    if isinstance(value, list):
        raise BadInput(f"{_place(part, shape, what, row)}: a list, not text")
    return value or ""


def _question(shape: Shape, text: str) -> str:
    """A prompt as it stands before its completion."""
    own = shape.column("prompt") == PAIRS[0][0]
    return text if own or not text or text[-1].isspace() else f"{text}\n"


def _text(part: Part, shape: Shape, row: int, text: Any) -> Example:
    return Example("text", _words(part, shape, "text", row, text))


def _chat(part: Part, shape: Shape, row: int, value: Any) -> Example:
    place = _place(part, shape, "messages", row)
    turns = messages(value, place)
    require_order(turns, place)
    return Example("chat", turns)


def _alpaca(part: Part, shape: Shape, row: int, *values: Any) -> Example:
    found = {what: _words(part, shape, what, row, value) for (what, _), value in zip(shape.columns, values, strict=True)}
    prompt = ALPACA_INPUT if found.get("input") else ALPACA
    return Example("completion", found.pop("output", ""), prompt.format(**found))


def _completion(part: Part, shape: Shape, row: int, prompt: Any, completion: Any = None) -> Example:
    if not shape.messages:
        given = _question(shape, _words(part, shape, "prompt", row, prompt))
        return Example("completion", _words(part, shape, "completion", row, completion), given)
    place = _place(part, shape, "completion", row)
    turns = messages(prompt, _place(part, shape, "prompt", row))
    said = (Message("assistant", completion or ""),) if listed(completion) is None else messages(completion, place)
    require_order((*turns, *said), f"{place} behind the prompt")
    return Example("completion", said, turns)


def _choice(part: Part, shape: Shape, row: int, prompt: Any, right: tuple[tuple[str, ...], int]) -> Example:
    choices, answer = right
    found = _completion(part, shape, row, prompt, choices[answer])
    return replace(found, choices=choices, answer=answer)


def _right(part: Part, shape: Shape, named: dict[str, tuple[Any, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """The choices of each row, and the index of the right one.

    Answers are read in one way for the whole column: as the choices' own texts where all are such, else as letters from A, else as
    indices from 0. BadInput where none of these fits, or where texts and indices both do and do not agree.
    """
    given = [_choices(value, _place(part, shape, "choices", row)) for row, value in enumerate(named["choices"])]
    said = [_words(part, shape, "completion", row, value).strip() for row, value in enumerate(named["completion"])]
    ways = [[_by_text(c, a), _by_letter(c, a), _by_index(c, a)] for c, a in zip(given, said, strict=True)]
    whole = [all(way[kind] is not None for way in ways) for kind in range(3)]
    if whole[0] and whole[2]:
        for row, (text, _, index) in enumerate(ways):
            if text != index:
                place = _place(part, shape, "completion", row)
                raise BadInput(f"{place}: '{said[row]}' is a choice and the index of another; letters (A, B, ...) tell them apart")
    kind = whole.index(True) if any(whole) else max(range(3), key=lambda kind: sum(way[kind] is not None for way in ways))
    found = []
    for row, way in enumerate(ways):
        answer = way[kind]
        if answer is None:
            place, count = _place(part, shape, "completion", row), len(given[row])
            ways_to = "the text of one, a letter from A, or an index from 0, all rows alike"
            raise BadInput(f"{place}: '{said[row]}' is none of the {count} choices; possible: {ways_to}")
        found.append((given[row], answer))
    return found


def _choices(value: Any, place: str) -> tuple[str, ...]:
    items = listed(value)
    if items is None or len(items) < 2 or not all(isinstance(item, str) and item.strip() for item in items):
        raise BadInput(f'{place}: no list of two or more choices, as in ["yes", "no"]')
    return tuple(items)


def _by_text(choices: Sequence[str], answer: str) -> int | None:
    fits = [at for at, choice in enumerate(choices) if choice.strip() == answer]
    return fits[0] if fits else None


def _by_letter(choices: Sequence[str], answer: str) -> int | None:
    at = ord(answer.upper()) - ord("A") if len(answer) == 1 and answer.isascii() else -1
    return at if 0 <= at < len(choices) else None


def _by_index(choices: Sequence[str], answer: str) -> int | None:
    return int(answer) if answer.isascii() and answer.isdecimal() and int(answer) < len(choices) else None


MAKERS: Mapping[str, Callable[..., Example]] = {
    "chat": _chat,
    "choices": _choice,
    "prompt-completion": _completion,
    "alpaca": _alpaca,
    "text": _text,
}
