"""From tables to examples: which shape is recognised, what each row becomes, and what is wrong, in one line."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedlora.config import Config, SourceConfig, as_tables, resolve
from fedlora.data import files
from fedlora.data.conversations import Example, Message
from fedlora.data.shapes import ALPACA, asked, examples, recognise, widened
from fedlora.data.source import Part
from fedlora.errors import BadInput

Columns = Mapping[str, Sequence[Any]]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TURNS = (Message("user", "a"), Message("assistant", "b"))


def save(folder: Path, kind: str, columns: Columns) -> Path:
    path = folder / f"rows.{kind}"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "parquet":
        parquet.write_table(pa.table(dict(columns)), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            nested = (list, dict)
            writer.writerows([json.dumps(x) if isinstance(x, nested) else x for x in row.values()] for row in rows)
    return path


def read(path: Path, name: str | None = None, **settings: Any) -> tuple[str, list[Example]]:
    """The shape of a file, and its examples."""
    config = resolve({"data": {"source": str(path), **settings}}).data.sources[0]
    part = files.read(path, widened(config)).train
    shape = recognise(part, config, name)
    return str(shape), [Example.from_json(text) for text in examples(part, shape)]


def pair(completion: str, prompt: str, **more: Any) -> Example:
    return Example("completion", completion, prompt, **more)


STANFORD = (  # copied from Stanford's train.py
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:"
)
STANFORD_ALONE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hi.\n\n### Response:"
)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("columns", "shape", "expected"),
    [
        ({"text": ["a", "b"]}, "text (text)", [Example("text", "a"), Example("text", "b")]),
        ({"id": ["1"], "messages": [CHAT]}, "chat (messages)", [Example("chat", TURNS)]),
        ({"conversations": [GPT]}, "chat (messages: conversations)", [Example("chat", TURNS)]),
        ({"prompt": ["p"], "completion": [" c"]}, "prompt-completion (prompt, completion)", [pair(" c", "p")]),
        (
            {"prompt": [CHAT[:1]], "completion": [CHAT[1:]]},
            "prompt-completion (prompt, completion; messages)",
            [Example("completion", TURNS[1:], TURNS[:1])],
        ),
        (
            {"instruction": ["Add {x}.", "Say hi."], "input": ["1 2", ""], "output": ["3", "hi"], "text": ["", ""]},
            "alpaca (instruction, input, output)",
            [pair("3", STANFORD), pair("hi", STANFORD_ALONE)],
        ),
        ({"instruction": ["Say hi."], "output": ["hi"]}, "alpaca (instruction, output)", [pair("hi", STANFORD_ALONE)]),
        (
            {"question": ["How many?", "Q\n"], "answer": ["#### 4", "5"]},
            "prompt-completion (prompt: question, completion: answer)",
            [pair("#### 4", "How many?\n"), pair("5", "Q\n")],
        ),
        ({"query": ["q"], "response": ["r"]}, "prompt-completion (prompt: query, completion: response)", [pair("r", "q\n")]),
        (
            {"question": ["Q?", "R?"], "choices": [["x", "y"], ["z", "y", "w"]], "answer": [1, 2]},
            "choices (prompt: question, choices: choices, completion: answer)",
            [pair("y", "Q?\n", choices=("x", "y"), answer=1), pair("w", "R?\n", choices=("z", "y", "w"), answer=2)],
        ),
        (
            {"prompt": ["Q:"], "choices": [["x", "y"]], "label": ["B"]},
            "choices (prompt: prompt, choices: choices, completion: label)",
            [pair("y", "Q:", choices=("x", "y"), answer=1)],
        ),
        (
            {"prompt": ["Q:"], "choices": [["4", "3"]], "completion": ["3"]},
            "choices (prompt, choices, completion)",
            [pair("3", "Q:", choices=("4", "3"), answer=1)],
        ),
    ],
)
def test_shapes(tmp_path: Path, kind: str, columns: Columns, shape: str, expected: list[Example]) -> None:
    assert read(save(tmp_path, kind, columns), None) == (shape, expected)


def test_messages_with_choices(tmp_path: Path) -> None:
    path = save(tmp_path, "jsonl", {"prompt": [CHAT[:1]], "choices": [["x", "b"]], "answer": ["b"]})
    _, (found,) = read(path)
    assert found == Example("completion", TURNS[1:], TURNS[:1], ("x", "b"), 1)


def test_columns_that_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, "jsonl", {"messages": [CHAT], "a": ["p"], "b": [7], "c": [GPT], "d": [["u", "v"]], "e": [1]})
    assert read(path)[0] == "chat (messages)"
    assert read(path, prompt="a", completion="b") == ("prompt-completion (prompt: a, completion: b)", [pair("7", "p\n")])
    assert read(path, messages="c") == ("chat (messages: c)", [Example("chat", TURNS)])
    assert read(path, text="a") == ("text (text: a)", [Example("text", "p")])
    multiple = pair("v", "p\n", choices=("u", "v"), answer=1)
    assert read(path, prompt="a", completion="e", choices="d")[1] == [multiple]
    assert read(save(tmp_path, "parquet", {"messages": [CHAT], "text": ["t"]}), "text")[0] == "text (text)"


def test_keys_that_are_not_set_are_not_written() -> None:
    assert not {"prompt", "completion", "messages", "choices", "nested"} & set(as_tables(Config())["data"])
    for tables, fault in (
        ({"prompt": "a"}, "data.prompt and data.completion are set together"),
        ({"messages": "a", "completion": "b"}, "data.messages is set, so data.prompt, data.completion and data.choices cannot be"),
    ):
        with pytest.raises(BadInput, match=fault):
            resolve({"data": tables})


def test_questions_of_people_are_put_like_those_of_the_data(tmp_path: Path) -> None:
    def shape(columns: Columns) -> Any:
        path = save(tmp_path, "jsonl", columns)
        config = SourceConfig(str(path), "text", "label")
        return recognise(files.read(path, widened(config)).train, config)

    assert asked(shape({"messages": [CHAT]}), "hi") == Example("chat", (Message("user", "hi"),))
    assert asked(shape({"prompt": [CHAT[:1]], "completion": [CHAT[1:]]}), "hi") == Example("chat", (Message("user", "hi"),))
    assert asked(shape({"question": ["q"], "answer": ["a"]}), "hi") == pair("", "hi\n")
    assert asked(shape({"prompt": ["q"], "completion": ["a"]}), "hi") == pair("", "hi")
    assert asked(shape({"instruction": ["q"], "output": ["a"]}), "hi") == pair("", ALPACA.format(instruction="hi"))
    assert asked(shape({"text": ["q"]}), "hi") == Example("text", "hi")


# ---- what is wrong -----------------------------------------------------------------------------------------------------


def line(path: Path, **settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_no_shape_fits(tmp_path: Path) -> None:
    path = save(tmp_path, "jsonl", {"title": ["x"], "body": ["y"]})
    found = line(path)
    assert found.startswith(
        "FILE: no columns for examples of a language model; it has 'title', 'body'; possible: messages; conversations;"
    )
    assert "; prompt and completion; instruction and output; question and answer; query and response; text; data.text, " in found
    assert line(path, name="chat").startswith(
        "FILE: no columns for the shape chat; it has 'title', 'body'; possible: messages; conv"
    )
    assert line(path, name="chats") == "unknown shape 'chats'; did you mean chat?"
    assert line(path, prompt="title", completion="bod").startswith(
        "FILE: no column 'bod'; it has 'title', 'body'; data.completion nam"
    )
    assert line(path, messages="turns").startswith(
        "FILE: no column 'turns'; it has 'title', 'body'; data.messages names the column"
    )


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ('{"messages": [{"role": "user", "content": "a"}', "line 7 is not valid JSON: Expecting"),
        ('["a"]', 'line 7 is no object, as in {"prompt": ..., "completion": ...}'),
        ("{}", "column 'messages', line 7: no list of messages"),
        ('{"messages": "a"}', "column 'messages', line 7: no list of messages"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "column 'messages', line 7, turn 2: roles",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "column 'messages', line 7, turn 1: roles out of order"),
    ],
)
def test_line_seven(tmp_path: Path, row: str, fault: str) -> None:
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": CHAT})
    path.write_text("\n".join([good, good, "", good, good, good, row, good]) + "\n")
    assert line(path).startswith(f"FILE: {fault}")


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"prompt": [CHAT[:1], "p"], "completion": [CHAT[1:]] * 2}, "column 'prompt', line 2: no list of messages"),
        ({"prompt": ["p", CHAT], "completion": ["a", "b"]}, ""),  # a text that looks like messages
        ({"prompt": [CHAT], "completion": [CHAT[1:]]}, "column 'completion', line 1 behind the prompt, turn 3: roles out of order"),
        (
            {"question": ["q"] * 2, "choices": [["a", "b"], "x"], "answer": ["a", "b"]},
            "column 'choices', line 2: no list of two or mo",
        ),
        ({"question": ["q"], "choices": [["a", ""]], "answer": ["a"]}, "column 'choices', line 1: no list of two or more choices"),
        (
            {"question": ["q"] * 2, "choices": [["a", "b"]] * 2, "answer": ["A", "C"]},
            "column 'answer', line 2: 'C' is none of the 2 ch",
        ),
        (
            {"question": ["q"] * 2, "choices": [["a", "b"]] * 2, "answer": ["0", "2"]},
            "column 'answer', line 2: '2' is none of the 2 ch",
        ),
        (
            {"question": ["q"], "choices": [["2", "1", "0"]], "answer": ["2"]},
            "column 'answer', line 1: '2' is a choice and the index o",
        ),
        ({"question": ["q"] * 2, "choices": [["2", "0"], ["7", "9"]], "answer": ["0", "1"]}, ""),  # indices, for 1 is no choice
    ],
)
def test_rows_that_are_wrong(tmp_path: Path, columns: Columns, fault: str) -> None:
    path = save(tmp_path, "jsonl", columns)
    if fault:
        assert line(path).startswith(f"FILE: {fault}")
    else:
        assert len(read(path)[1]) == len(columns[next(iter(columns))])


def test_parquet_of_other_values(tmp_path: Path) -> None:
    path = save(tmp_path, "parquet", {"prompt": ["p"], "completion": [0.5]})
    assert line(path) == "FILE: column 'completion' holds double, not text"
    path = save(tmp_path, "parquet", {"prompt": ["p"], "completion": [["a"]]})
    assert line(path) == "FILE: column 'completion', row 1: a list, not text"
    path = save(tmp_path, "parquet", {"prompt": ["p"], "completion": [5]})
    assert read(path)[1] == [pair("5", "p")]


def test_a_test_part_is_read_in_the_shape_of_the_training_part() -> None:
    train = Part("train", pa.table({"prompt": ["p"], "completion": ["c"]}))
    shape = recognise(train, SourceConfig("", "text", "label"))
    with pytest.raises(BadInput, match="test: no column 'completion'; it has 'prompt', 'text'"):
        examples(Part("test", pa.table({"prompt": ["p"], "text": ["c"]})), shape)
