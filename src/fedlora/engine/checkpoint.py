"""Checkpoints: the server and what clients keep, two generations, each complete or absent.

    checkpoint/round-00005.json        which files make this generation, with their digests
    checkpoint/server-00005.fed        the server after round 5
    checkpoint/kept-00005.fed          what the clients of round 5 keep; clients of earlier rounds stay in the earlier files

Every file is written under another name, flushed to disk and renamed, the json last: after a kill at any moment the newest json
names only whole files. A file that no generation names any more is deleted.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fedlora.engine import wire
from fedlora.engine.inprocess import Kept
from fedlora.engine.loop import Server
from fedlora.errors import BadInput

GENERATIONS = 2
Files = dict[int, tuple[str, str]]  # client -> the file that holds what it keeps, and its digest


@dataclass(frozen=True)
class Saved:
    """What a checkpoint gives back. `problems` says what was damaged and passed over, a line each."""

    server: Server
    kept: dict[int, Kept]
    files: Files
    problems: tuple[str, ...] = ()


def save(folder: Path, server: Server, kept: Mapping[int, Kept], changed: Iterable[int], files: Files) -> Files:
    """Write a generation.

    Args:
        kept: what every client keeps; only that of the clients in `changed` is written.
        files: the table of the generation before; empty at the start of a run.

    Returns:
        The table of this generation.
    """
    folder.mkdir(exist_ok=True)
    tag = f"{server.round:05d}"
    table = dict(files)
    now = {id: kept[id] for id in changed}
    if any(k.held is not None or k.head or k.memory for k in now.values()):
        name = f"kept-{tag}.fed"
        table |= dict.fromkeys(now, (name, write_whole(folder / name, wire.encode(now))))
    server_file = f"server-{tag}.fed"
    digests = {server_file: write_whole(folder / server_file, wire.encode(server))} | dict(table.values())
    manifest = {"round": server.round, "digests": digests, "kept": {str(id): name for id, (name, _) in table.items()}}
    write_whole(folder / f"round-{tag}.json", json.dumps(manifest).encode())
    _sweep(folder)
    return table


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
    return _digest(data)


def _load(manifest: Path, method: Any, problems: tuple[str, ...]) -> Saved:
    listed = _read(manifest)
    classes = [Server, Kept, *wire.message_classes(method)]
    found: dict[str, Any] = {}
    for name, digest in listed["digests"].items():
        data = (manifest.parent / name).read_bytes()
        if _digest(data) != digest:
            raise ValueError(f"{name} is damaged")
        found[name] = wire.decode(data, classes)
    holders = {int(id): name for id, name in listed["kept"].items()}
    return Saved(
        server=found[f"server-{listed['round']:05d}.fed"],
        kept={id: found[name][id] for id, name in holders.items()},
        files={id: (name, listed["digests"][name]) for id, name in holders.items()},
        problems=problems,
    )


def _read(manifest: Path) -> dict[str, Any]:
    try:
        listed: dict[str, Any] = json.loads(manifest.read_bytes())
        return {"round": listed["round"], "digests": dict(listed["digests"]), "kept": dict(listed["kept"])}
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
            keep |= _read(m)["digests"].keys()
        except ValueError:
            continue
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink(missing_ok=True)


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
