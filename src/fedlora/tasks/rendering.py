"""From an example of a language model to token ids, and which of them it learns.

Chats go through the tokenizer's chat template, which alone says what special tokens there are. What is learned of an assistant's
turn is what the model has to write after its prompt: from the end of the generation prompt (rendered from the turns before) to the
end-of-turn token, that included, and nothing behind it, such as the template's line break. Where the template renders earlier turns
otherwise than it did when they were last, so that the prompt is no prefix, it is the content alone and the end-of-turn token.
A template's own marks, {% generation %}, say it better and are taken as they are. Where nothing ends the last answer, as in GLM's
template, the end-of-text token is appended, or the model would never stop.

Texts, and prompts with completions, get what the tokenizer adds to a text, and the end-of-text token, which is learned whatever the
padding token is. They are tokenised as one text; a token across the boundary belongs to the completion.

The first token of all is never learned: nothing stands before it that it could be told from.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.conversations import Example, Message
from fedlora.errors import BadInput, first_line

Spans = Sequence[tuple[int, int]]  # of characters, from the first to the one behind the last
PROBE = "Zqxjprobe"  # stands in for an answer, to see what a template writes around it
DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24"}  # Llama 3's own, where there is no clock
CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('{code}', '{value}')" for code, value in DATE.items())
    + " }}{% endmacro %}\n"
)
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """An example as a model takes it.

    Attributes:
        ids: token ids, (n,), int32.
        trained: which of them the loss is on, (n,), bool.
        text: what was tokenised, before it was cut; without the end-of-text token that was appended.
        fault: why it cannot train; empty where it can.
        cut: whether part of what is learned was cut off; all of it is a fault.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    text: str
    fault: str = ""
    cut: bool = False


def render(tokenizer: Any, example: Example, limit: int | None = None, end: bool = True) -> Rendered:
    """The tokens of an example, the first `limit` of them.

    Args:
        end: whether the token that ends an answer is learned, and appended where it is not the template that writes it.

    Raises:
        BadInput: the tokenizer has no chat template, which messages need, or no end-of-text token, which texts need.
    """
    plain = not example.messages
    if plain:
        text, answer = f"{example.prompt}{example.completion}", str(example.completion)
        spans: Spans = [(len(text) - len(answer), len(text))]
        ended = False
        fault = "" if answer.strip() else "empty text" if example.kind == "text" else "empty answer"
    else:
        text, spans, ended, fault = _chat(tokenizer, example, end)
    ids, trained = _tokens(tokenizer, text, spans, special=plain)
    if end and not ended and ids[-1:].tolist() != [_end_of_text(tokenizer)]:
        ids, trained = np.append(ids, np.int32(_end_of_text(tokenizer))), np.append(trained, True)
    trained[:1] = False
    trained &= not fault
    if not fault and not trained.any():
        fault = "empty answer"
    found = Rendered(ids[:limit], trained[:limit], text, fault, cut=bool(trained[limit:].any()) if limit is not None else False)
    if not fault and not found.trained.any():
        return replace(found, fault=f"the prompt fills the {limit} tokens", cut=False)
    return found


def choices(tokenizer: Any, example: Example, limit: int | None = None) -> tuple[Rendered, ...]:
    """The example with each of its choices as the completion, whose log-likelihoods are compared: without what ends an answer."""
    made = []
    for choice in example.choices:
        said = choice if isinstance(example.completion, str) else (Message("assistant", choice),)
        made.append(render(tokenizer, replace(example, completion=said, choices=(), answer=None), limit, end=False))
    return tuple(made)


def prompt_ids(tokenizer: Any, example: Example) -> NDArray[np.int32]:
    """What the model is given before it answers, (n,): of a chat the turns before the assistant's last one, with the generation
    prompt; of a text all of it. BadInput: as `render`, or the template refuses the chat."""
    if example.messages:
        turns = _seated(tokenizer, example.messages)
        try:
            text = _template(tokenizer, turns[:-1] if turns[-1].role == "assistant" else turns, ask=True)
        except _Refused as error:
            raise BadInput(str(error)) from error
        return _encoded(tokenizer, text, special=False)[0]
    text = str(example.completion if example.kind == "text" else example.prompt)
    return _encoded(tokenizer, text, special=True)[0]


def shown(rendered: Rendered, tokenizer: Any) -> str:
    """The tokens as text, special ones too, with what is learned between « and »."""
    edges = np.flatnonzero(np.diff(rendered.trained.astype(np.int8), prepend=0, append=0))
    # A piece is what it adds to the text before it: tokens decoded by themselves lose their spaces.
    whole = [_decoded(tokenizer, rendered.ids[:edge]) for edge in (0, *edges, len(rendered.ids))]
    pieces = [longer[_common(shorter, longer) :] for shorter, longer in pairwise(whole)]
    return "".join(f"«{piece}»" if at % 2 else piece for at, piece in enumerate(pieces))


def _decoded(tokenizer: Any, ids: NDArray[np.int32]) -> str:
    text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)) if len(ids) else ""
    return text.rstrip("\ufffd")  # the first bytes of a character, whose last ones are behind the edge


# ---- chats -------------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """A chat template's own words on a chat that it does not take."""


def _chat(tokenizer: Any, example: Example, end: bool) -> tuple[str, Spans, bool, str]:
    """The rendered text, what of it is learned, whether it is ended or needs no end, and the fault."""
    given = len(example.messages) - len(example.completion)
    answers = [message.content.strip() for message in example.messages[given:] if message.role == "assistant"]
    fault = "no assistant turn" if not answers else "" if all(answers) else "empty answer"
    try:
        turns = _seated(tokenizer, example.messages)
        text = _template(tokenizer, turns)
    except _Refused as error:
        return "", [], True, fault or str(error)
    given = max(given + len(turns) - len(example.messages), 0)  # a system turn may be part of the user's now
    if end and MARKS.search(_source(tokenizer)):
        spans = _marked(tokenizer, turns, text, given)
    else:
        at = [place for place, turn in enumerate(turns) if turn.role == "assistant" and place >= given]
        found = {place: _span(tokenizer, turns, place, text, end) for place in at}
        for place in (place for place, span in found.items() if span is None):
            return text, [], True, fault or f"the chat template leaves out or changes turn {place + 1}"
        spans = [span for span in found.values() if span is not None]
    ended = turns[-1].role != "assistant" or any(map(text.rstrip().endswith, _known(tokenizer)))
    return text, spans if ended or not end or not spans else [*spans[:-1], (spans[-1][0], len(text))], ended, fault


def _seated(tokenizer: Any, turns: Sequence[Message]) -> Sequence[Message]:
    """The turns as the template can take them: where it refuses a system turn, or leaves its text out of an answered chat, that
    text begins the first turn of the user."""
    if turns[0].role != "system" or len(turns) == 1:
        return turns
    answered = turns[1:] if turns[-1].role == "assistant" else [*turns[1:], Message("assistant", "-")]
    try:
        if PROBE in _template(tokenizer, [Message("system", PROBE), *answered]):
            return turns
    except _Refused:
        pass
    system, user = turns[0].content, turns[1].content
    return [Message("user", f"{system}\n\n{user}" if system.strip() else user), *turns[2:]]


def _template(tokenizer: Any, turns: Sequence[Message], ask: bool = False) -> str:
    """Turns through the chat template, with the generation prompt where `ask`."""
    from jinja2 import TemplateError

    source, said = _source(tokenizer), [turn._asdict() for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(said, chat_template=source, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise _Refused(f"the chat template refuses it: {first_line(error)}") from error


def _source(tokenizer: Any) -> str:
    """The chat template, with a clock that stands still where it asks for the date: else no run could be repeated tomorrow."""
    if not tokenizer.chat_template:
        raise BadInput(
            "the model's tokenizer has no chat template, which messages need; possible: a model tuned for chats, or data of plain "
            "texts in the columns prompt and completion"
        )
    source = str(tokenizer.get_chat_template())
    return CLOCK + source if "strftime_now" in source else source


def _marked(tokenizer: Any, turns: Sequence[Message], text: str, given: int) -> Spans:
    """What stands between the template's own marks, behind the turns that are given."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _, (spans,) = render_jinja_template(
        [[turn._asdict() for turn in turns]],
        chat_template=_source(tokenizer),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    first = _common(_template(tokenizer, turns[:given], ask=True), text) if any(x.role == "user" for x in turns[:given]) else 0
    return [span for span in spans if span[1] > first]


def _span(tokenizer: Any, turns: Sequence[Message], at: int, text: str, end: bool) -> tuple[int, int] | None:
    """Where in the text the assistant's turn stands; None where that cannot be told."""

    def around(behind: Sequence[Message]) -> tuple[str, str, str]:
        return _template(tokenizer, [*turns[:at], Message("assistant", PROBE), *behind]).partition(PROBE)

    head, found, tail = around(turns[at + 1 :])
    if not found or not text.endswith(tail):
        return None
    stop = len(text) - len(tail)
    try:
        before = _template(tokenizer, turns[:at], ask=True)
    except _Refused:
        before = head
    start = len(before) if text[:stop].startswith(before) else _common(head, text)
    return start, stop + (len(_end_of_turn(tokenizer, tail, alone=around(())[2] if at + 1 < len(turns) else tail)) if end else 0)


def _end_of_turn(tokenizer: Any, tail: str, alone: str) -> str:
    """What ends an answer, of the text behind it: special or added tokens that stand there also where nothing follows (`alone`).
    What does not begins the next turn; but a template may end its last turn by another token than those before."""
    here = [token for token in _known(tokenizer) if token in alone or token in tail]
    known = "|".join(map(re.escape, sorted(here, key=len, reverse=True)))
    last = re.match(rf"\s*(?:{known})+", alone) if known else None
    first = re.match(rf"\s*(?:{known})", tail) if last else None
    return last[0] if last and tail.startswith(last[0]) else first[0] if first else ""


def _known(tokenizer: Any) -> set[str]:
    """The tokens beside the vocabulary of texts, most of them special."""
    return {*tokenizer.get_added_vocab(), *filter(None, [tokenizer.eos_token])}


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many first items two texts, or two lists, share."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- tokens ------------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: Any, text: str, spans: Spans, special: bool) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The ids of a text, (n,), and which tokens hold a character of the spans, (n,)."""
    ids, ranges = _encoded(tokenizer, text, special)
    trained = np.zeros(len(ids), dtype=np.bool_)
    if ranges is not None:
        starts, stops = ranges.T
        for start, stop in spans:
            trained |= (stops > start) & (starts < stop)
        return ids, trained
    for start, stop in spans:  # no offsets: the tokens that a text shares with its beginnings
        before, within = (_encoded(tokenizer, text[:edge], special)[0].tolist() for edge in (start, stop))
        shared = _common(within, ids.tolist())
        trained[_common(before, ids.tolist()) : shared + (shared < len(within))] = True
    return ids, trained


def _encoded(tokenizer: Any, text: str, special: bool) -> tuple[NDArray[np.int32], NDArray[np.int64] | None]:
    """The ids of a text, (n,), without an end-of-text token that the tokenizer appends, and not begun twice; and the characters of
    each, (n, 2), where the tokenizer can tell. `special` adds what the tokenizer adds to a text."""
    fast = bool(tokenizer.is_fast)
    found = tokenizer(
        text,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_special_tokens_mask=special,
        return_offsets_mapping=fast,
        verbose=False,
    )
    ids = np.array(found["input_ids"], dtype=np.int32)
    added = np.array(found["special_tokens_mask"] if special else [0] * len(ids), dtype=np.bool_)
    keep = np.ones(len(ids), dtype=np.bool_)
    if special:
        keep[-1:] = not (added[-1:].any() and ids[-1] == tokenizer.eos_token_id)
        keep[:1] = not (len(ids) > 1 and added[0] and ids[0] == ids[1] == tokenizer.bos_token_id)
    if not fast:
        return ids[keep], None
    ranges = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    # Offsets may leave out the space before a word: a token begins where the one before it ended, at the latest.
    ends = np.maximum.accumulate(np.concatenate([[0], ranges[:-1, 1]])) if len(ranges) else ranges[:, 0]
    ranges[:, 0] = np.minimum(ranges[:, 0], ends)
    return ids[keep], ranges[keep]


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise BadInput("the model's tokenizer has no end-of-text token (eos_token), with which a text or an answer ends")
    return int(tokenizer.eos_token_id)
