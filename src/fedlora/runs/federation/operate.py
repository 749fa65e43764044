"""What `fedlora federate server` and `fedlora federate client` do: they start Flower's processes, show what these say, and stay
until the federation is done or somebody stops them."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedlora.clients import reach
from fedlora.disk import alone, write_whole
from fedlora.errors import BadInput, RunFailed
from fedlora.runs.federation.folder import Federation, Home, absolute, flower_home, number_of
from fedlora.runs.federation.processes import CONNECTION, Control, check_server, executable, follow, running, superlink, supernode
from fedlora.runs.federation.session import ENDED, LOG, SESSION, STATUS, Session, worker_command
from fedlora.signals import alive

Say = Callable[[str], None]
GOODBYE = 2.0  # seconds in which Flower tells the nodes that the run is over
LOOK = 30.0  # seconds between two looks at the server
POLL = 0.5  # seconds between two looks at what the processes say
PATIENCE, AGAIN = 150.0, 10.0  # seconds in which a node that is not let in tries again, and between two tries
REGISTERED = "nodes.json"  # name -> the public key and Flower's number of its node


def serve(
    federation: Federation, out: Path, resume: bool, model: str | None, secure: bool, address: tuple[str, int], say: Say
) -> dict[str, Any]:
    """Play a federation on this machine's SuperLink, to its end; returns the run's summary.

    Raises:
        BadInput, RunFailed: why it ended before.
    """
    executable("flower-superlink")
    config, server = federation.config, federation.server
    if out.exists() and not resume:
        raise BadInput(f"{out} exists already; give --resume to go on with it, or another --out")
    server.mkdir(exist_ok=True)
    keys = _keys(federation, config.clients.names or []) if secure else {}
    with alone(server, "stop it first"):
        for name in (ENDED, STATUS):
            (server / name).unlink(missing_ok=True)
        session = Session(str(federation.path.resolve()), str(out.resolve()), resume, model and absolute(model), secure)
        session.write(server / "session.json")
        environment = flower_home(server) | {SESSION: str((server / "session.json").resolve())}
        log = server / "flower.log"
        control = Control(federation, address[1], secure)
        lines = follow({server / LOG: say})
        with running(superlink(federation, *address, secure), environment, log) as process:
            control.wait(process, log)
            _register(control, server / REGISTERED, keys)
            say(f"listening on {address[0]}, port {address[1]}, {'with TLS and keys' if secure else 'without TLS and keys'}")
            run = control.start(federation.app)
            looked = time.monotonic()
            while not (server / ENDED).exists():
                next(lines)
                if process.poll() is not None:
                    raise RunFailed(f"the SuperLink ended (see {log}); start the server again with --resume")
                if _gone(server / STATUS) or time.monotonic() - looked > 60:
                    looked = time.monotonic()
                    if control.state(run).startswith("finished") and not (server / ENDED).exists():
                        raise RunFailed(f"the server's app ended (see {log}); start the server again with --resume")
                time.sleep(POLL)
            next(lines)
            time.sleep(GOODBYE)
        ended = json.loads((server / ENDED).read_text())
    if ended["status"]:
        raise (BadInput if ended["status"] == 2 else RunFailed)(ended["error"])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def _keys(federation: Federation, names: list[str]) -> dict[str, Path]:
    """The public keys that are there, by the client's name."""
    found = {name: file for name in names if (file := federation.keys / f"{name}.pub").is_file()}
    if not found:
        raise BadInput(
            f"{federation.keys}: no client's key is there, as in {names[0]}.pub; make-key.sh makes one (or give --insecure)"
        )
    return found


def _register(control: Control, file: Path, keys: dict[str, Path]) -> None:
    """Let in the nodes with these keys, and those alone that have them now."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name, key in keys.items():
        text = key.read_text().strip()
        before = known.get(name)
        if before and before["key"] == text:
            continue
        if before:
            control("supernode", "unregister", str(before["node"]), CONNECTION)
        found = control("supernode", "register", str(key.resolve()), CONNECTION, "--name", name)
        known[name] = {"key": text, "node": found["node-id"]}
        write_whole(file, json.dumps(known, indent=1).encode())


def _gone(status: Path) -> bool:
    """Whether the process that writes the status is no more."""
    with suppress(OSError, ValueError, KeyError):
        return not alive(json.loads(status.read_text())["pid"])
    return status.exists()


def attend(
    federation: Federation,
    home: Home,
    name: str,
    data: str,
    model: str | None,
    key: Path | None,
    address: tuple[str, int],
    threads: int | None,
    say: Say,
) -> None:
    """Take part in a federation from this machine, until somebody stops it.

    Args:
        key: the private key; None is a federation without keys.

    Raises:
        BadInput, RunFailed: why it cannot.
    """
    executable("flower-supernode")
    config = federation.config
    number_of(config, name)
    home.path.mkdir(parents=True, exist_ok=True)
    with alone(home.path, "give this one another --home"), worker(home):
        home.write(federation.path, name, absolute(data), absolute(model or config.model.source), threads)
        lines = follow({home.path / reach.LOG: say})
        environment = flower_home(home.path)
        Path(environment["FLWR_HOME"]).mkdir(parents=True, exist_ok=True)
        command = supernode(federation, home, *address, key)
        there = check_server(federation, *address, key is not None)
        try:
            reach.start(home.path, worker_command(home.path))
        except reach.WorkerDied as died:
            next(lines)
            raise BadInput(str(died).partition("error: ")[2] or str(died)) from died
        next(lines)
        say(f"{name} is ready, and joins {address[0]}, port {address[1]}")
        trouble = "" if there else _silent(address)
        if trouble:
            say(trouble)
        log = home.path / "flower.log"
        refused_since, looked, known = None, time.monotonic(), _pid(home)
        while True:
            begun = time.monotonic()
            with running(command, environment, log) as process:
                while process.poll() is None and not _left_alone(home.path):
                    next(lines)
                    if _pid(home) != known:
                        known = _pid(home)
                        say("its worker had ended, and was started anew")
                    if time.monotonic() - looked > LOOK:
                        looked, before, trouble = time.monotonic(), trouble, _trouble(federation, address, key is not None)
                        if trouble != before:
                            say(trouble or f"{address[0]}, port {address[1]}: the server is there")
                    time.sleep(POLL)
                ended = process.poll()
            if ended is None or ended < 0:
                say("the node, or what answers for it, was killed; the node starts anew")
                refused_since = None
                continue
            # Flower lets nobody in who was there less than a minute ago and did not say goodbye.
            if refused_since is None or time.monotonic() - begun > PATIENCE:  # it was in before
                refused_since = begun
            if "Failed to activate SuperNode" not in _last(log) or time.monotonic() - refused_since > PATIENCE:
                raise RunFailed(f"the node ended with status {ended}: {_why(log)}")
            say(
                "the server does not let the node in: its key is not known there, or the node was there a moment ago, or another "
                "node has this key; trying again"
            )
            time.sleep(AGAIN)


def _trouble(federation: Federation, address: tuple[str, int], secure: bool) -> str:
    """Why the server cannot be joined now; "" where it can."""
    try:
        return "" if check_server(federation, *address, secure) else _silent(address)
    except BadInput as error:
        return str(error)


def _silent(address: tuple[str, int]) -> str:
    return f"{address[0]}, port {address[1]}: no server is there now; the node goes on trying"


def _left_alone(home: Path) -> bool:
    """Whether a message is nobody's any more: the process that had it was killed, and Flower's node would wait for it for ever."""
    for file in home.glob("asking-*"):
        pid = int(file.name.partition("-")[2])
        if not alive(pid):
            file.unlink(missing_ok=True)
            return True
    return False


def _why(log: Path) -> str:
    """The last thing that a node said."""
    text = _last(log)
    if "Failed to activate SuperNode" in text:
        return (
            "the server does not know its key: the operator puts its .pub into keys/ and starts the server again; or another node "
            f"has the same key: each machine makes its own (see {log})"
        )
    return f"{text[-300:]} (see {log})"


def _last(log: Path) -> str:
    """The last lines of a log, as one."""
    return " ".join(log.read_text(errors="replace")[-2000:].split())


@contextmanager
def worker(home: Home) -> Iterator[None]:
    """The worker of a home ends with the block."""
    try:
        yield
    finally:
        process = _pid(home)
        if process is not None:
            with suppress(OSError):
                os.kill(process, signal.SIGTERM)


def _pid(home: Home) -> int | None:
    """The process of a home's worker, or of the last one; None where there never was any."""
    with suppress(OSError, ValueError):
        return int((reach.place_of(home.path) / reach.PID).read_text())
    return None


def to_stdout(text: str) -> None:
    """A line as people and logs see it."""
    print(text, file=sys.stdout, flush=True)
