"""Checkpoints: the server and what clients keep, two generations, each complete or absent.

    checkpoint/round-00005.json        which files make this generation, with their digests
    checkpoint/server-00005.fed        the server after round 5
    checkpoint/kept-00005.fed          what the clients of round 5 keep (`fedlora.clients.state`)

Every file is written under another name, flushed to disk and renamed, the json last: after a kill at any moment the newest json
names only whole files. A file that no generation names any more is deleted. The generation of the best round by validation stays.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora import wire
from fedlora.clients.state import ClientState, Location, read
from fedlora.disk import digest, write_whole
from fedlora.errors import BadInput
from fedlora.server.loop import Server

GENERATIONS = 2


@dataclass(frozen=True)
class Saved:
    """What a checkpoint gives back: the server, and where what clients keep lies. `problems` says what was damaged and passed
    over, a line each."""

    server: Server
    places: Mapping[int, Location]
    problems: tuple[str, ...] = ()


def save(
    folder: Path, server: Server, places: Mapping[int, Location], config: Mapping[str, Any] | None = None, best: int | None = None
) -> None:
    """Write a generation.

    Args:
        places: where what each client keeps lies in `folder`.
        config: the tables of the run's configuration.
        best: a round whose generation stays, too.
    """
    folder.mkdir(exist_ok=True)
    tag = f"{server.round:05d}"
    name = f"server-{tag}.fed"
    written = write_whole(folder / name, wire.encode(server))
    kept = {str(id): place for id, place in places.items()}
    manifest = {"round": server.round, "server": [name, written], "kept": kept, "config": config}
    write_whole(_manifest(folder, server.round), json.dumps(manifest).encode())
    _sweep(folder, best)


def configured(folder: Path) -> dict[str, Any] | None:
    """The tables of the configuration with which the newest generation was written; None where that is not known."""
    for manifest in reversed(_manifests(folder)):
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads(manifest.read_bytes()).get("config")
            return None if found is None else dict(found)
    return None


def load(folder: Path, method: Any, round: int | None = None) -> Saved | None:
    """The newest generation that is whole, or that of a round; None when there is none at all.

    Raises:
        BadInput: there are generations, and each is damaged; names the files.
    """
    problems: list[str] = []
    manifests = _manifests(folder) if round is None else [_manifest(folder, round)]
    for manifest in reversed(manifests):
        try:
            return _load(manifest, method, tuple(problems))
        except (ValueError, KeyError, TypeError, OSError) as error:
            problems.append(f"{manifest.parent.name}/{manifest.name}: {error}")
    if problems:
        raise BadInput(f"every checkpoint in {folder} is damaged: {'; '.join(problems)}")
    return None


def _load(manifest: Path, method: Any, problems: tuple[str, ...]) -> Saved:
    listed = _read(manifest)
    classes = [Server, ClientState, *wire.message_classes(method)]
    name, expected = listed["server"]
    data = (manifest.parent / name).read_bytes()
    if digest(data) != expected:
        raise ValueError(f"{name} is damaged")
    for place in listed["kept"].values():
        read(manifest.parent, place, classes)
    return Saved(wire.decode(data, classes), listed["kept"], problems)


def _read(manifest: Path) -> dict[str, Any]:
    try:
        listed: dict[str, Any] = json.loads(manifest.read_bytes())
        name, expected = listed["server"]
        kept = {int(id): Location(*place) for id, place in listed["kept"].items()}
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
    keep = {m.name for m in manifests}
    for m in manifests:
        try:
            listed = _read(m)
        except (ValueError, OSError):
            continue
        keep |= {listed["server"][0], *(place.file for place in listed["kept"].values())}
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink(missing_ok=True)
