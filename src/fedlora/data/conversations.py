"""Examples of a language model: texts, prompts with completions, and chats.

An example stands in a data set as its canonical JSON (`Example.to_json`), so equal examples are equal strings.

A chat's turns are in order: at most one system turn, which is the first, and then user and assistant in turn, the user first. Of a
message, the role and the content are read; other keys, such as a name, are passed over, and tool calls are refused.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fedlora.errors import BadInput, unknown

ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # what `from` says there -> the role


class Message(NamedTuple):
    """One turn of a chat; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What a model learns from.

    Attributes:
        kind: text: the completion is learned whole, and there is no prompt. completion: the completion is learned, the prompt is
            given. chat: the assistant's turns of the completion are learned, and there is no prompt.
        completion: a text, or messages: of a chat all of them; of a completion those behind the prompt's.
        prompt: a text, or messages; both are of one type where there are both.
        choices: of multiple choice, the texts that the completion is one of.
        answer: the index of the right one of them.
    """

    kind: Literal["text", "completion", "chat"]
    completion: str | tuple[Message, ...]
    prompt: str | tuple[Message, ...] = ""
    choices: tuple[str, ...] = ()
    answer: int | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """All turns of an example of messages; none of one of texts."""
        return () if isinstance(self.completion, str) else (*_turns_of(self.prompt), *self.completion)

    @property
    def reference(self) -> str:
        """The text that a generated answer is compared with: the completion, or the last turn where that is the assistant's."""
        if isinstance(self.completion, str):
            return self.completion
        last = self.completion[-1:]
        return last[0].content if last and last[0].role == "assistant" else ""

    @property
    def length(self) -> int:
        """The characters of its prompt and its completion."""
        sides = (self.prompt, self.completion)
        return sum(len(side) if isinstance(side, str) else sum(len(turn.content) for turn in side) for side in sides)

    def to_json(self) -> str:
        """The canonical JSON: sorted keys, no spaces, nothing escaped that need not be, and no key that is empty."""
        found = {
            "kind": self.kind,
            "prompt": _plain(self.prompt),
            "completion": _plain(self.completion),
            "choices": list(self.choices),
            "answer": self.answer,
        }
        kept = {key: value for key, value in found.items() if value not in ("", [], None)}
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Example":
        found = json.loads(text)
        completion, prompt = (_read(found.get(key, "")) for key in ("completion", "prompt"))
        return cls(found["kind"], completion, prompt, tuple(found.get("choices", ())), found.get("answer"))


def _turns_of(side: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return () if isinstance(side, str) else side


def _plain(side: str | tuple[Message, ...]) -> Any:
    return side if isinstance(side, str) else [message._asdict() for message in side]


def _read(side: Any) -> str | tuple[Message, ...]:
    return side if isinstance(side, str) else tuple(Message(each["role"], each["content"]) for each in side)


def messages(value: Any, place: str) -> tuple[Message, ...]:
    """The messages that a list of objects is, or JSON text of one: {role, content}, or {from, value} as ShareGPT has them.

    Raises:
        BadInput: what is wrong, in which turn of `place`: no list, a role or a content that is missing or unknown, tool calls.
    """
    items = listed(value)
    if items is None or not all(isinstance(item, dict) for item in items):
        raise BadInput(f'{place}: no list of messages, as in [{{"role": "user", "content": "..."}}, ...]')
    if not items:
        raise BadInput(f"{place}: a chat without a turn")
    return tuple(_message(item, f"{place}, turn {turn}") for turn, item in enumerate(items, 1))


def listed(value: Any) -> list[Any] | None:
    """A list, or the one that JSON text stands for; None where it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _message(item: dict[str, Any], place: str) -> Message:
    sharegpt = item.get("role") is None and item.get("from") is not None
    role, content = (item.get(key) for key in (("from", "value") if sharegpt else ("role", "content")))
    if role is None:
        raise BadInput(f"{place}: no role; a message has role and content, or from and value")
    role = SHAREGPT.get(role, role) if sharegpt and isinstance(role, str) else role
    if role not in ROLES:
        raise BadInput(f"{place}: {unknown('role', str(role), (*ROLES, *(SHAREGPT if sharegpt else ())))}")
    if item.get("tool_calls"):
        raise BadInput(f"{place}: tool calls, which are not read; chats of texts are possible")
    if not isinstance(content, str):
        fault = "no content" if content is None else f"its content is {type(content).__name__}, not text"
        raise BadInput(f"{place}: {fault}; a message has {'from and value' if sharegpt else 'role and content'}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{place}: its content is not Unicode: half of a surrogate pair") from error
    return Message(role, content)


def require_order(turns: tuple[Message, ...], place: str) -> None:
    """BadInput where roles are out of order: which turn, and what could stand there."""
    for at, message in enumerate(turns):
        before = turns[at - 1].role if at else ""
        first = at == 0 or (at == 1 and before == "system")
        here = f"{place}, turn {at + 1}: roles out of order:"
        if message.role == "system" and at:
            raise BadInput(f"{here} a system turn can only be the first")
        if message.role == "assistant" and first:
            raise BadInput(f"{here} the assistant's turn comes before any of the user's")
        if message.role == before:
            raise BadInput(f"{here} {message.role} after {before}; user and assistant take turns")
