"""Examples of a language model and their canonical JSON; what is wrong with messages, in one line."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.conversations import Example, Message, messages, require_order
from fedlora.errors import BadInput

PLACE = "a.jsonl: column 'messages', line 7"
TURNS = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), st.text()), min_size=1, max_size=4).map(tuple)
EXAMPLES = st.one_of(
    st.builds(Example, st.just("text"), st.text()),
    st.builds(Example, st.just("chat"), TURNS),
    st.builds(Example, st.just("completion"), TURNS, TURNS),
    st.builds(Example, st.just("completion"), st.text(), st.text(), st.lists(st.text()).map(tuple), st.none() | st.integers(0, 9)),
)


@settings(max_examples=40, deadline=None)
@given(EXAMPLES)
def test_an_example_is_its_json(example: Example) -> None:
    text = example.to_json()
    assert Example.from_json(text) == example and Example.from_json(text).to_json() == text
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False) == text


def test_the_json_by_hand() -> None:
    turns = (Message("user", "où?"), Message("assistant", "là"))
    expected = '{"completion":[{"content":"où?","role":"user"},{"content":"là","role":"assistant"}],"kind":"chat"}'
    assert Example("chat", turns).to_json() == expected
    multiple = Example("completion", "b", "Q\n", ("a", "b"), 1)
    assert multiple.to_json() == '{"answer":1,"choices":["a","b"],"completion":"b","kind":"completion","prompt":"Q\\n"}'


def test_references() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"))
    assert Example("chat", turns).reference == "b" and Example("chat", turns[:1]).reference == ""
    assert Example("completion", "c", "p").reference == "c" and Example("completion", turns[1:], turns[:1]).reference == "b"


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [
            {"from": "user", "value": "a", "role": None},
            {"from": "assistant", "value": "b", "content": None},
        ],  # of one struct of both
        '[{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]',
    ],
)
def test_messages(value: Any) -> None:
    assert messages(value, PLACE) == (Message("user", "a"), Message("assistant", "b"))


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, ": no list of messages, as in"),
        ("hello", ": no list of messages, as in"),
        ("[" * 100_000, ": no list of messages, as in"),
        (["hello"], ": no list of messages, as in"),
        ([], ": a chat without a turn"),
        ([{"content": "a"}], ", turn 1: no role; a message has role and content, or from and value"),
        (
            [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}],
            ", turn 2: unknown role 'bot'; possible: assistant, ",
        ),
        ([{"from": "chatgpt", "value": "b"}], ", turn 1: unknown role 'chatgpt'; did you mean gpt?"),
        ([{"role": "human", "content": "a"}], ", turn 1: unknown role 'human'; possible: assistant, system, user"),
        ([{"role": 1, "content": "a"}], ", turn 1: unknown role '1'; possible: assistant, system, user"),
        ([{"role": "user"}], ", turn 1: no content; a message has role and content"),
        ([{"from": "human", "content": "x"}], ", turn 1: no content; a message has from and value"),
        ([{"role": "user", "content": [{"type": "text"}]}], ", turn 1: its content is list, not text"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], ", turn 1: tool calls, which are not read"),
        ('[{"role": "user", "content": "\\ud800"}]', ", turn 1: its content is not Unicode"),
    ],
)
def test_messages_that_are_none(value: Any, fault: str) -> None:
    with pytest.raises(BadInput) as caught:
        messages(value, PLACE)
    assert str(caught.value).startswith(PLACE + fault) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("roles", "fault"),
    [
        ("user assistant user assistant", ""),
        ("system user assistant", ""),
        ("user", ""),
        ("system", ""),
        ("assistant user", ", turn 1: roles out of order: the assistant's turn comes before any of the user's"),
        ("system assistant", ", turn 2: roles out of order: the assistant's turn comes before any of the user's"),
        ("user user assistant", ", turn 2: roles out of order: user after user; user and assistant take turns"),
        ("system user assistant assistant", ", turn 4: roles out of order: assistant after assistant; user and"),
        ("user assistant system user", ", turn 3: roles out of order: a system turn can only be the first"),
    ],
)
def test_order(roles: str, fault: str) -> None:
    turns = tuple(Message(role, "x") for role in roles.split())
    if not fault:
        require_order(turns, PLACE)
        return
    with pytest.raises(BadInput) as caught:
        require_order(turns, PLACE)
    assert str(caught.value).startswith(PLACE + fault)
