"""What people see of a language model on the command line: answers to prompts and files, streams, conversations."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny

import fedlora as package
from fedlora.chat import converse
from fedlora.config import resolve
from fedlora.data.conversations import Example
from fedlora.errors import BadInput
from fedlora.models.quiet import quiet
from fedlora.runs.play import execute
from fedlora.runs.predict import choose, load
from fedlora.tasks import defaults
from fedlora.tasks.base import Turn
from fedlora.tasks.prompts import conversation, pieces, shown

CHATS = [("where is it?", "it is here"), ("and the other?", "there")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a model of 300 tokens; runs/pairs of questions and answers, runs/chats of messages."""
    place = tmp_path_factory.mktemp("place")
    model, tokenizer = architectures.causal("llama")
    with quiet():
        model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    rows = [{"question": f"{i} and 1?", "answer": f"{i + 1}!"} for i in range(12)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": [*turns, *turns[: i % 2 * 2]]}) + "\n" for i in range(8)))
    for name in ("pairs", "chats"):
        common: dict[str, Any] = {
            "precision": "fp32",
            "task": {"name": "causal_lm", "max_new_tokens": 6},
            "method": {"name": "fedit"},
            "model": {"source": str(place / "base")},
            "data": {"source": str(place / f"{name}.jsonl"), "partition": "iid"},
            "clients": {"count": 2, "rank": 2},
            "train": {"rounds": 1, "lr": 0.05},
        }
        execute(resolve(defaults(common), common), place / "runs" / name, False, tiny.Silent())
    return place


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    return tiny.console(monkeypatch, capsys, tmp_path)


def alone(place: Path, name: str, prompt: str, limit: int = 6, tuned: bool = True) -> str:
    """The answer by PEFT and transformers' own generation."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base").eval()
    model = peft.PeftModel.from_pretrained(base, place / "runs" / name / "adapter").eval() if tuned else base
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def chatml(*turns: str) -> str:
    """Turns of user and assistant, by hand."""
    roles = ("user", "assistant")
    said = "".join(f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns))
    return f"{said}<|im_start|>assistant\n"


def test_answers_of_arguments_lines_and_files(place: Path, fedlora: Callable[..., Any], tmp_path: Path) -> None:
    run = place / "runs" / "pairs"
    wanted = alone(place, "pairs", "3 and 1?\n")
    status, out, err = fedlora("predict", run, "3 and 1?", "--format", "json")
    assert status == 0, err
    answer = json.loads(out)
    assert list(answer) == ["prompt", "answer", "tokens"] and answer["prompt"] == "3 and 1?" and answer["answer"] == wanted
    assert json.loads(fedlora("predict", run, "--format", "json", stdin="3 and 1?\n")[1]) == answer
    status, out, err = fedlora("predict", run, "--input", place / "pairs.jsonl", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert status == 0 and len(rows) == 12, err
    assert rows[3] == {"prompt": "3 and 1?", "answer": wanted, "tokens": str(answer["tokens"]), "reference": "4!"}
    (tmp_path / "only.csv").write_text("question\n3 and 1?\n")  # answers are not needed
    alike = json.loads(fedlora("predict", run, "--input", "only.csv", "--format", "json")[1])
    assert alike == {**answer, "reference": ""}
    (tmp_path / "blank.txt").write_text("\n3 and 1?\n")
    assert len(fedlora("predict", run, "--input", "blank.txt")[1].splitlines()) == 2
    short = json.loads(fedlora("predict", run, "3 and 1?", "--format", "json", "--max-new-tokens", "2")[1])
    assert short["tokens"] <= 2 and short["answer"] == alone(place, "pairs", "3 and 1?\n", 2)


def test_the_base_beside_the_tuned_model(place: Path, fedlora: Callable[..., Any]) -> None:
    run = place / "runs" / "pairs"
    status, out, err = fedlora("predict", run, "--input", place / "pairs.jsonl", "--compare-base", "--format", "json")
    assert status == 0, err
    row = json.loads(out.splitlines()[3])
    assert list(row) == ["prompt", "base", "tuned", "reference"] and row["base"] != row["tuned"]
    assert row["base"] == alone(place, "pairs", "3 and 1?\n", tuned=False) and row["tuned"] == alone(place, "pairs", "3 and 1?\n")
    assert package.load(run).predict(["3 and 1?"], base=True)[0]["answer"] == row["base"]
    status, out, _ = fedlora("predict", run, "3 and 1?", "--compare-base")
    assert status == 0 and len(out.rstrip("\n").split("\t")) == 3


def test_messages_are_prompts_in_python_and_in_files(place: Path, fedlora: Callable[..., Any]) -> None:
    run = package.load(place / "runs" / "chats")
    said = run.predict([[{"role": "user", "content": "hi"}], "hi"])
    assert said[0] == said[1] and said[0]["answer"] == alone(place, "chats", chatml("hi"))
    out = fedlora("predict", run.folder, "--input", place / "chats.jsonl", "--format", "json")[1].splitlines()
    assert json.loads(out[0]) == {"prompt": "hi", **said[0], "reference": "ho"}
    assert json.loads(out[1])["prompt"] == "user: hi\nassistant: ho\nuser: hi"
    with pytest.raises(BadInput, match="prompt 1, turn 1: no content"):
        run.predict([[{"role": "user"}]])


class Console:
    """Somebody who types these lines, and interrupts where there is None."""

    def __init__(self, *lines: str | None) -> None:
        self.lines: Iterator[str | None] = iter(lines)
        self.said, self.noted = "", list[str]()

    def read(self) -> str:
        try:
            line = next(self.lines)
        except StopIteration:
            raise EOFError from None
        if line is None:
            raise KeyboardInterrupt
        return line

    def write(self, text: str) -> None:
        self.said += text


def test_a_conversation_keeps_what_was_said(place: Path) -> None:
    model, console = load(choose(place / "runs" / "chats")), Console("hi", "", "you?", None, "/reset", "you?", "/what")
    converse({"": model}, console.read, console.write, console.noted.append)
    first = alone(place, "chats", chatml("hi"))
    second, anew = alone(place, "chats", chatml("hi", first, "you?")), alone(place, "chats", chatml("you?"))
    assert console.said == f"{first}\n{second}\n\n{anew}\n\n"
    assert "begins anew" in console.noted[2] and "unknown command /what" in console.noted[3]


def test_both_models_answer_by_what_each_has_said(place: Path) -> None:
    model, console = load(choose(place / "runs" / "chats")), Console("hi", "you?", "/exit", "never read")
    converse({"base": model.base, "tuned": model}, console.read, console.write, console.noted.append)
    wanted = ""
    said: dict[str, list[str]] = {"base": [], "tuned": []}
    for question in ("hi", "you?"):
        for name, turns in said.items():
            answer = alone(place, "chats", chatml(*turns, question), tuned=name == "tuned")
            turns += [question, answer]
            wanted += f"{name}: {answer}\n"
    assert console.said == wanted


def test_an_interrupted_answer_stays_as_far_as_it_came(place: Path) -> None:
    model, console = load(choose(place / "runs" / "chats"), max_new_tokens=40), Console("hi", "you?")
    whole = alone(place, "chats", chatml("hi"), 40)
    pieces: list[str] = []

    def interrupting(text: str) -> None:
        console.write(text)
        pieces.append(text)
        if len([piece for piece in pieces if piece]) == 3:
            raise KeyboardInterrupt

    converse({"": model}, console.read, interrupting, console.noted.append)
    part = "".join(pieces[:4])  # the name of the model, which is empty, stands before
    assert part and whole.startswith(part) and part != whole
    assert console.said == f"{part}\n{alone(place, 'chats', chatml('hi', part, 'you?'), 40)}\n\n" and "interrupted" in console.noted


def test_the_oldest_turns_go_where_there_is_no_room(place: Path) -> None:
    """Of 300 tokens; a turn here has more than 60, an answer six."""
    model, console = load(choose(place / "runs" / "chats")), Console(*["x" * 60] * 7, "x" * 400, "hi")
    converse({"": model}, console.read, console.write, console.noted.append)
    gone = [text for text in console.noted if "left out" in text]
    assert gone and "the oldest turn is left out" in gone[0]
    assert any("a prompt of 4" in text and "the model takes 300" in text for text in console.noted)
    turns = tuple(Turn("x" * 60, "y" * 9) for _ in range(6))
    given, dropped = model.told(turns, "x")
    ids = [len(model.pretrained.processor(chatml(*[z for t in turns[k:] for z in t], "x"))["input_ids"]) for k in range(6)]
    assert dropped == next(k for k in range(6) if ids[k] + 6 <= 300) > 0
    assert [turn.content for turn in given.messages] == [*[z for t in turns[dropped:] for z in t], "x"]


def test_an_answer_ends_where_the_context_is_full(place: Path) -> None:
    model = load(choose(place / "runs" / "pairs"), max_new_tokens=300)
    long, short = model.answers(["x" * 250, "3 and 1?"])
    assert long["tokens"] == 300 - 251 and short["tokens"] > 49  # a question ends in a line break; no answer is cut for another


def test_how_a_conversation_is_asked_of_models_of_questions(place: Path) -> None:
    """As their training data had each question, for that is what they know."""
    model = load(choose(place / "runs" / "pairs"))
    example = conversation((Turn("3 and 1?", "4!"),), "and 1?", model)
    assert example == Example("completion", "", "3 and 1?\n4!\n\nand 1?\n") and shown(example) == "3 and 1?\n4!\n\nand 1?"


def test_pieces_are_whole_characters_and_together_the_text() -> None:
    raw, heard = "né 9".encode(), list[str]()
    told = pieces(lambda ids: raw[: len(ids)].decode("utf-8", "replace"), heard.append)
    for end in range(1, len(raw) + 1):
        told(range(end))
    told(range(len(raw)), whole=True)
    assert heard == ["n", "é", " ", "9"]


BAD = {
    "arguments": (["--chat", "hi"], "--chat reads lines as they are typed; leave texts as arguments out"),
    "a file": (["--chat", "--input", "x.txt"], "leave --input out"),
    "a format": (["--chat", "--format", "csv"], "leave --format out"),
    "no tokens": (["hi", "--max-new-tokens", "0"], "--max-new-tokens"),
    "more tokens than there is room for": (["hi", "--max-new-tokens", "400"], "max_new_tokens = 400: the model takes 300 tokens"),
    "no room": (["x" * 400], "a prompt of 401 tokens; the model takes 300, its answer among them: xxx"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_answered(arguments: list[str], said: str, place: Path, fedlora: Callable[..., Any]) -> None:
    status, out, err = fedlora("predict", place / "runs" / "pairs", *arguments)
    assert status == 2 and not out and said in err and len(err.splitlines()) == 1


def test_what_is_learned_of_an_example_is_shown(place: Path, fedlora: Callable[..., Any], tmp_path: Path) -> None:
    source = ("data", place / "pairs.jsonl", "--task", "causal_lm", "--clients", "2", "--set", "data.partition=iid")
    status, out, err = fedlora(*source, "--model", place / "base")
    assert status == 0, err
    assert "prompt-completion (prompt: question, completion: answer)" in out and "\n«" in out and "!<|im_end|>»" in out
    # "10 and 1?", a line break, "11!" and what ends it: a byte a token, but for "and"
    longest = 9 + 1 + 3 + 1 - 2
    assert f"the longest {longest}; 0 of 10 are longer than 300, where they are cut" in out  # the tokenizer allows no more
    status, out, err = fedlora(*source, "--model", place / "base", "--set", "data.max_length=11")
    assert status == 0 and "1 of 10 training examples is longer than 11 tokens" in out
    status, out, err = fedlora(*source, "--model", place / "base", "--set", "data.max_length=7")
    assert status == 2 and "can be used: 10 for the prompt fills the 7 tokens; the first: 0 and 1? 1!" in err
    status, _, err = fedlora(*source, "--model", "nowhere")
    assert status == 2 and "unknown model 'nowhere'" in err
    (tmp_path / "labels.csv").write_text("text,label\n" + "a,x\nb,y\n" * 10)
    status, _, err = fedlora("data", "labels.csv", "--clients", "2", "--model", "m")
    assert status == 2 and "--model: of text classification nothing is shown" in err


@pytest.mark.slow
def test_a_chat_on_a_terminal(place: Path) -> None:
    """Through a pseudo-terminal: Ctrl-C ends an answer and not the session, Ctrl-D ends it with status 0."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from fedlora.cli import main; main()", "predict", str(place / "runs" / "chats"), "--chat"]
    command += ["--max-new-tokens", "250"]
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, **ends, start_new_session=True, preexec_fn=controlling)
    os.close(theirs)
    seen = ""

    def until(text: str, since: int = 0) -> None:
        nonlocal seen
        end = time.time() + 120
        while text not in seen[since:]:
            assert time.time() < end, seen
            seen += os.read(ours, 4096).decode("utf-8", "replace")

    until("> ")
    os.write(ours, b"hi\n")
    until("hi\r\n")
    time.sleep(0.1)
    os.write(ours, b"\x03")
    until("> ", len(seen))
    os.write(ours, b"/reset\n")
    until("begins anew")
    until("> ", seen.index("begins anew"))
    os.write(ours, b"\x04")
    assert process.wait(60) == 0 and "Traceback" not in seen


def controlling() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_on_a_terminal_the_base_answers_above_the_tuned_model(place: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from fedlora.cli import main; main()", "predict", str(place / "runs" / "pairs"), "hi"]
    command += ["--compare-base", "--max-new-tokens", "5"]
    done = subprocess.run(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, timeout=120)
    os.close(theirs)
    seen = os.read(ours, 4096).decode("utf-8", "replace")
    assert done.returncode == 0, done.stderr
    assert seen.startswith("base: ") and "\r\ntuned: " in seen and "\t" not in seen
