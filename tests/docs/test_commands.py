"""Every command of the documentation is run.

Commands stand in blocks marked `console`, after "$ ". They run in order, in one folder per document, on little data: each
`fedlora run` and `fedlora compare` is cut to few rounds over 100 examples or less. The files that a document speaks of as the
reader's own are made here; a block marked `toml` that begins with a file's name in a comment is that file.
"""

import re
import shlex
import sys
from pathlib import Path

import architectures
import pytest
import tiny

from fedlora import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
ELSEWHERE = {ROOT / "docs" / name for name in ("evaluate.md", "federation.md", "workers.md")}  # run by tests of their own
LONG = {ROOT / "docs" / name for name in ("compare.md", "tracking.md", "language.md")}  # whole grids, and whole runs
SMALL = {
    "run": ["--rounds", "2", "--set", "data.limit=100", "--set", "data.test_limit=100", "--set", "data.max_length=16"],
    "compare": ["--set", "train.rounds=1", "--set", "data.limit=40", "--set", "data.test_limit=40", "--set", "data.max_length=16"],
}


def commands(document: Path) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", document.read_text(), re.DOTALL)
    return [line[2:].split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def save_letters(folder: Path) -> None:
    """The hospitals' letters, and a tiny language model."""
    rows = [f"{'ABC'[i % 3]},May I drive on day {i}?,Yes. Day {i} is fine." for i in range(60)]
    (folder / "letters.csv").write_text("\n".join(["hospital,question,answer", *rows]) + "\n")
    model, tokenizer = architectures.causal("llama/tied")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(d, id=d.relative_to(ROOT).as_posix(), marks=pytest.mark.slow if d in LONG else ())
        for d in DOCUMENTS
        if d not in ELSEWHERE
    ],
)
def test_commands_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_data(tmp_path)
    (tmp_path / "tickets.csv").write_text((tmp_path / "train.csv").read_text().replace("text,label", "message,team", 1))
    if document.stem == "language":
        save_letters(tmp_path)
    for name, text in re.findall(r"```toml\n# (\S+\.toml)\n(.*?)```", document.read_text(), re.DOTALL):
        (tmp_path / name).write_text(text)
    for command in commands(document):
        words = shlex.split(command)
        if words[0] == "make":
            assert set(words[1:]) <= make_targets(), command
            continue
        if words[0] in {"git", "cd", "pip"}:
            continue
        assert words[0] == "fedlora", f"{document.name}: what is {command!r}?"
        words += SMALL.get(words[1], [])
        if document.stem == "language":  # its tokens are letters
            words = [word.replace("max_length=16", "max_length=96") for word in words]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, f"{command}\n{''.join(capsys.readouterr())}"


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith(("http", "mailto")):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
