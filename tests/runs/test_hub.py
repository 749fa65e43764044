"""Folders that are pushed arrive byte by byte; what keeps them from it is said in one line, and the folder stays."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub import TOKEN, Hub, serving

import fedlora
from fedlora.config import resolve
from fedlora.runs.hub import private_base
from fedlora.runs.play import execute

PUSH = """
import os, sys
from pathlib import Path
from fedlora.errors import BadInput, RunFailed
from fedlora.runs.hub import check, push
for job in sys.argv[1:]:
    folder, repository, public, token = job.split(",")
    os.environ["HF_TOKEN"] = token
    try:
        check(repository)
        print(push(Path(folder), repository, public == "public"))
    except (BadInput, RunFailed) as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found
    assert found.wrong == []


def environment(endpoint: str, place: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return own | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(Path(fedlora.__file__).parents[1])}


def push(endpoint: str, place: Path, *jobs: str, **more: str) -> list[str]:
    """What pushes of folders say, a line each, in a process with nothing but the environment to go by."""
    command = [sys.executable, "-c", PUSH, *jobs]
    done = subprocess.run(command, cwd=place, env=environment(endpoint, place) | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def save(folder: Path, **files: bytes) -> dict[str, bytes]:
    folder.mkdir()
    named = {name.replace("__", "."): content for name, content in files.items()}
    for name, content in named.items():
        (folder / name).write_bytes(content)
    return named


def test_what_arrives_is_what_was_exported(hub: Hub, tmp_path: Path) -> None:
    """Into a repository of its own, private; again, with a whole model, into the same one, whose adapter goes and whose other
    files stay; and into a public one."""
    weights = bytes(range(256)) * 4096
    one = {"adapter_model__safetensors": weights, "adapter_config__json": b"{}", "README__md": b"# one\n", "empty__txt": b""}
    one = save(tmp_path / "one", **one)
    two = save(tmp_path / "two", model__safetensors=weights[::-1], config__json=b"{ }", README__md=b"# two\n")
    said = push(hub.endpoint, tmp_path, f"one,org/name,private,{TOKEN}")
    assert said == [f"{hub.endpoint}/org/name"] and hub.repositories == {"org/name": one}
    hub.repositories["org/name"] |= {".gitattributes": b"of the Hub", "notes.md": b"of its owner"}
    said = push(hub.endpoint, tmp_path, f"two,org/name,public,{TOKEN}", f"two,org/other,public,{TOKEN}")
    assert said == [f"{hub.endpoint}/org/name", f"{hub.endpoint}/org/other"]
    kept = {".gitattributes": b"of the Hub", "notes.md": b"of its owner", "empty.txt": b""}
    assert hub.repositories == {"org/name": two | kept, "org/other": two}
    assert hub.visibility == {"org/name": "private", "org/other": "public"}


def test_what_keeps_it_from_arriving(hub: Hub, tmp_path: Path) -> None:
    save(tmp_path / "one", model__safetensors=b"x" * 99, README__md=b"# one\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    jobs = [f"one,{name},private,{TOKEN}" for name in ("org/name", "closed/name", "full/name", "name", "a/b/c")]
    jobs += ["one,org/name,private,hf_another", "one,org/name,private,"]
    kept = "the exported folder is kept; push it by: hf upload {} one"
    (said,) = push(nowhere, tmp_path, jobs[0])
    assert (
        said.startswith(f"RunFailed --push org/name: {nowhere}: ") and said.endswith(kept.format("org/name")) and "refused" in said
    )
    hub.forbidden, hub.broken = {"closed"}, {"full/name"}
    _, closed, full, short, long, stranger, nobody = push(hub.endpoint, tmp_path, *jobs)
    for said, name in ((closed, "closed/name"), (stranger, "org/name")):
        assert said.startswith(f"BadInput --push {name}: this token may not write there (") and said.endswith(kept.format(name))
    assert full.startswith(f"RunFailed --push full/name: {hub.endpoint}: ") and full.endswith(kept.format("full/name"))
    assert "501" in full and hub.repositories["full/name"] == {}
    assert short == "BadInput --push name: ORG/NAME is needed, as in my-hospital/name"
    assert long.startswith("BadInput --push a/b/c: ")
    assert nobody == "BadInput --push org/name: no token for the Hub; set HF_TOKEN, or log in by `hf auth login`"
    (said,) = push(hub.endpoint, tmp_path, jobs[0], HF_HUB_OFFLINE="1")
    assert said.startswith("BadInput --push org/name: HF_HUB_OFFLINE=1 keeps the network off")


def test_which_bases_others_do_not_have(tmp_path: Path) -> None:
    assert private_base(tmp_path) is None  # a whole model
    for base, private in (("org/name", None), ("gpt2", None), ("/home/me/bert", "/home/me/bert"), ("/m/x.gguf", "/m/x.gguf")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert private_base(tmp_path) == private


@pytest.mark.slow
def test_the_command_pushes_what_it_exports(hub: Hub, bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    tables = {
        "model": {"source": str(bert_folder)},
        "data": {"source": str(csv_folder)},
        "method": {"name": "fedit"},
        "clients": {"count": 2, "rank": 2},
        "train": {"rounds": 1},
    }
    execute(resolve(tables), tmp_path / "one", False, tiny.Silent())

    def export(to: str) -> "subprocess.CompletedProcess[str]":
        command = [Path(sys.executable).with_name("fedlora"), "export", "one", "--to", to, "--push", "org/name"]
        return subprocess.run(command, cwd=tmp_path, env=environment(hub.endpoint, tmp_path), capture_output=True, text=True)

    done = export("to")
    assert done.returncode == 0
    note = f"note: others need the adapter's base, which is {bert_folder} here; --merged pushes the whole model"
    assert done.stderr.splitlines() == [note]
    assert done.stdout.splitlines() == ["adapter in to", f"pushed to {hub.endpoint}/org/name"]
    assert hub.repositories["org/name"] == {file.name: file.read_bytes() for file in (tmp_path / "to").iterdir()}
    hub.broken = {"org/name"}
    done = export("again")
    assert done.returncode == 1 and (tmp_path / "again").is_dir()
    first, line = done.stderr.splitlines()
    assert first == note and line.startswith("error: --push org/name: ") and line.endswith("push it by: hf upload org/name again")
