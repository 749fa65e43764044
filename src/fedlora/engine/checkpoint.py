"""Checkpoints: the server and what clients keep, two generations, each complete or absent.

    checkpoint/round-00005.json        which files make this generation, with their digests
    checkpoint/server-00005.fed        the server after round 5
    checkpoint/kept-00005.fed          what the clients of round 5 keep (`fedlora.engine.kept`)

Every file is written under another name, flushed to disk and renamed, the json last: after a kill at any moment the newest json
names only whole files. A file that no generation names any more is deleted.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.engine import wire
from fedlora.engine.kept import Kept, Place, digest, read
from fedlora.engine.loop import Server
from fedlora.errors import BadInput

GENERATIONS = 2


@dataclass(frozen=True)
class Saved:
    """What a checkpoint gives back: the server, and where what clients keep lies. `problems` says what was damaged and passed
    over, a line each."""

    server: Server
    places: Mapping[int, Place]
    problems: tuple[str, ...] = ()


def save(folder: Path, server: Server, places: Mapping[int, Place]) -> None:
    """Write a generation; `places` say where what each client keeps lies in `folder`."""
    folder.mkdir(exist_ok=True)
    tag = f"{server.round:05d}"
    name = f"server-{tag}.fed"
    written = write_whole(folder / name, wire.encode(server))
    manifest = {"round": server.round, "server": [name, written], "kept": {str(id): place for id, place in places.items()}}
    write_whole(folder / f"round-{tag}.json", json.dumps(manifest).encode())
    _sweep(folder)


def load(folder: Path, method: Any) -> Saved | None:
    """The newest generation that is whole, or None when there is none at all.

    Raises:
        BadInput: there are generations, and each is damaged; names the files.
    """
    problems: list[str] = []
    for manifest in reversed(_manifests(folder)):
        try:
            return _load(manifest, method, tuple(problems))
        except (ValueError, KeyError, TypeError, OSError) as error:
            problems.append(f"{manifest.parent.name}/{manifest.name}: {error}")
    if problems:
        raise BadInput(f"every checkpoint in {folder} is damaged: {'; '.join(problems)}")
    return None


def write_whole(path: Path, data: bytes) -> str:
    """Write a file so that it is either there with all of `data` or not at all; returns the digest of the data."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return digest(data)


def _load(manifest: Path, method: Any, problems: tuple[str, ...]) -> Saved:
    listed = _read(manifest)
    classes = [Server, Kept, *wire.message_classes(method)]
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
        kept = {int(id): Place(*place) for id, place in listed["kept"].items()}
        return {"round": listed["round"], "server": (name, expected), "kept": kept}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest.name} is damaged") from error


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.json"))


def _sweep(folder: Path) -> None:
    """Delete what no generation that we keep names."""
    manifests = _manifests(folder)
    keep = {m.name for m in manifests[-GENERATIONS:]}
    for m in manifests[-GENERATIONS:]:
        try:
            listed = _read(m)
        except ValueError:
            continue
        keep |= {listed["server"][0], *(place.file for place in listed["kept"].values())}
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink(missing_ok=True)
