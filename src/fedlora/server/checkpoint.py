"""Checkpoints of the server, two generations, each complete or absent. What clients keep is theirs (`fedlora.clients.state`): the
server names it by the round in which their replies counted last.

    checkpoint/round-00005.json        which files make this generation, with their digests
    checkpoint/server-00005.fed        the server after round 5
    checkpoint/incarnation             how often the server has been started

Every file is written under another name, flushed to disk and renamed, the json last: after a kill at any moment the newest json
names only whole files. A file that no generation names any more is deleted. The generation of the best round by validation stays.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora import wire
from fedlora.disk import digest, write_all, write_whole
from fedlora.errors import BadInput
from fedlora.server.loop import Server

GENERATIONS = 2
INCARNATION = "incarnation"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint gives back.

    Attributes:
        problems: what was damaged and passed over, a line each.
        kept: of a checkpoint of an earlier version, client -> where in its folder lies what the client keeps: file, start, length
            and digest. None where clients keep it elsewhere.
    """

    server: Server
    problems: tuple[str, ...] = ()
    kept: Mapping[int, tuple[str, int, int, str]] | None = None


def started(folder: Path) -> int:
    """How often the server has been started, this time counted in. A damaged file counts as none: then a worker that outlived the
    server may have to be told more than once."""
    folder.mkdir(exist_ok=True)
    file = folder / INCARNATION
    before = 0
    with suppress(OSError, ValueError):
        before = int(file.read_text())
    write_whole(file, str(before + 1).encode())
    return before + 1


def save(folder: Path, server: Server, config: Mapping[str, Any] | None = None, best: int | None = None) -> None:
    """Write a generation.

    Args:
        config: the tables of the run's configuration.
        best: a round whose generation stays, too.
    """
    folder.mkdir(exist_ok=True)
    tag = f"{server.round:05d}"
    name = f"server-{tag}.fed"
    data = wire.encode(server)
    manifest = {"round": server.round, "server": [name, digest(data)], "config": config}
    write_all({folder / name: data, _manifest(folder, server.round): json.dumps(manifest).encode()})
    _sweep(folder, best)


def configured(folder: Path) -> dict[str, Any] | None:
    """The tables of the configuration with which the newest generation was written; None where that is not known."""
    for manifest in reversed(_manifests(folder)):
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads(manifest.read_bytes()).get("config")
            return None if found is None else dict(found)
    return None


Whole = Callable[[Saved], Saved]


def load(folder: Path, method: Any, round: int | None = None, whole: Whole = lambda saved: saved) -> Saved | None:
    """The newest generation that is whole, or that of a round; None when there is none at all.

    Args:
        whole: completes what a generation says from elsewhere; raises ValueError where what it rests on there is damaged.

    Raises:
        BadInput: there are generations, and each is damaged; names the files.
    """
    problems: list[str] = []
    manifests = _manifests(folder) if round is None else [_manifest(folder, round)]
    for manifest in reversed(manifests):
        try:
            return whole(_load(manifest, method, tuple(problems)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            problems.append(f"{manifest.parent.name}/{manifest.name}: {error}")
    if problems:
        raise BadInput(f"every checkpoint in {folder} is damaged: {'; '.join(problems)}")
    return None


def _load(manifest: Path, method: Any, problems: tuple[str, ...]) -> Saved:
    listed = _read(manifest)
    classes: list[type[Any]] = [Server, *wire.message_classes(method)]
    name, expected = listed["server"]
    data = (manifest.parent / name).read_bytes()
    if digest(data) != expected:
        raise ValueError(f"{name} is damaged")
    return Saved(wire.decode(data, classes), problems, listed["kept"])


def _read(manifest: Path) -> dict[str, Any]:
    try:
        listed: dict[str, Any] = json.loads(manifest.read_bytes())
        name, expected = listed["server"]
        kept = listed.get("kept")
        if kept is not None:
            kept = {int(id): (str(file), int(at), int(size), str(its)) for id, (file, at, size, its) in kept.items()}
        return {"round": listed["round"], "server": (name, expected), "kept": kept}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest.name} is damaged") from error


def _manifest(folder: Path, round: int) -> Path:
    return folder / f"round-{round:05d}.json"


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.json"))


def _sweep(folder: Path, best: int | None) -> None:
    """Delete what no generation that we keep names."""
    newest = _manifests(folder)[-GENERATIONS:]
    manifests = newest if best is None else {*newest, _manifest(folder, best)}
    keep = {INCARNATION, *(m.name for m in manifests)}
    for m in manifests:
        try:
            listed = _read(m)
        except (ValueError, OSError):
            continue
        keep |= {listed["server"][0], *(file for file, *_ in (listed["kept"] or {}).values())}
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink(missing_ok=True)
