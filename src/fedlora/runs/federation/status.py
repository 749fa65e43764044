"""How a federation is doing, for people: `fedlora federate status`."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from fedlora.disk import is_held
from fedlora.errors import BadInput
from fedlora.runs.federation import session
from fedlora.runs.federation.folder import Federation
from fedlora.summary import read_metrics, read_rows

OVER = ("done", "failed", "stopped")  # how the stage begins of what no longer runs here


def status(federation: Federation) -> dict[str, Any]:
    """Who is there, which round it is, what crossed the wire, what failed, and how long it will take.

    Raises:
        BadInput: no server was started in this folder.
    """
    place = federation.server
    try:
        how = session.read(place / "session.json")
        said: dict[str, Any] = json.loads((place / session.STATUS).read_text())
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{federation.path}: no server was started here yet; fedlora federate server starts it") from error
    rows = []
    with suppress(BadInput, OSError):
        rows = read_rows(Path(how.out))
    ended = None
    with suppress(OSError, ValueError):
        ended = json.loads((place / session.ENDED).read_text())
    found: dict[str, Any] = {"stage": "starting"} | {key: said[key] for key in ("stage", "round", "rounds", "clients")}
    found["run"] = how.out
    found["upload_bytes"] = sum(row["upload_bytes"] for row in rows)
    found["download_bytes"] = sum(row["download_bytes"] for row in rows)
    found["failures"] = {row["round"]: row["failures"] for row in rows if row.get("failures")}
    if rows:
        found |= {"metric": rows[-1]["metric"], "score": rows[-1]["score"]}
        last = rows[-5:]
        found["seconds_left"] = (said["rounds"] - rows[-1]["round"]) * sum(row["wall_s"] for row in last) / len(last)
    if ended is not None:
        found["stage"] = f"failed: {ended['error']}" if ended["status"] else "done"
    elif not is_held(place):
        found["stage"] = f"stopped: no server runs here; fedlora federate server {federation.path} --resume goes on"
    if found["stage"].startswith(OVER):
        found.pop("seconds_left", None)
        found["clients"] = {name: state.replace("connected", "was there", 1) for name, state in found["clients"].items()}
    return found


def shown(found: Mapping[str, Any]) -> Group:
    """The same as a table."""
    head = Table.grid(padding=(0, 2))
    head.add_row("stage", str(found.get("stage", "-")))
    head.add_row("round", f"{found.get('round', 0)} of {found['rounds']}")
    if found.get("score") is not None:
        (metric, *_) = [m for m in read_metrics(Path(found["run"])) if m.name == found["metric"]]
        head.add_row(metric.title, metric.text(found["score"]))
    head.add_row("bytes", f"up {found['upload_bytes'] / 1e6:.2f} MB  down {found['download_bytes'] / 1e6:.2f} MB")
    left = found.get("seconds_left")
    if left:
        head.add_row("left", f"about {left / 60:.0f} minutes" if left >= 90 else f"about {left:.0f} seconds")
    clients = Table(box=None, pad_edge=False, header_style="bold")
    clients.add_column("client")
    clients.add_column("state")
    clients.add_column("failed rounds", justify="right")
    names = list(found["clients"])
    for i, (name, state) in enumerate(found["clients"].items()):
        failed = [round for round, why in found["failures"].items() if str(i) in why]
        clients.add_row(name, state, str(len(failed)) if failed and i < len(names) else "")
    return Group(head, "", clients)
