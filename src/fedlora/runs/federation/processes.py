"""Flower's own processes: a SuperLink and a run of the app on the server, a SuperNode on a client. They are started as the operator
would by hand, and end with the process that started them."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.errors import BadInput, RunFailed
from fedlora.runs.federation.folder import Federation, Home, flower_home

CONNECTION = "fedlora"  # the name of the SuperLink in Flower's configuration
GOODBYE = 10.0  # seconds that a process has to end by itself
UP = 60.0  # seconds within which a SuperLink answers
HANDSHAKE = 10.0  # seconds within which a server does


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its own group, all of which ends with the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for kind, patience in ((signal.SIGTERM, GOODBYE), (signal.SIGKILL, GOODBYE)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        end = time.monotonic() + patience
        while time.monotonic() < end:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def superlink(federation: Federation, host: str, port: int, secure: bool) -> list[str]:
    """The command of the server's SuperLink."""
    command = ["flower-superlink", "--host", host, "--port", str(port), "--disable-runtime-dependency-installation"]
    command += ["--database", str((federation.server / "superlink.db").resolve())]
    if not secure:
        return [*command, "--insecure"]
    tls = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
    for option, name in tls.items():
        file = federation.certificate.with_name(name)
        if not file.is_file():
            raise BadInput(
                f"{file} is missing; make it with: sh {federation.path / 'make-certificates.sh'} HOST (or give --insecure)"
            )
        command += [f"--ssl-{option}", str(file.resolve())]
    return [*command, "--enable-supernode-auth"]


def supernode(federation: Federation, home: Home, host: str, port: int, key: Path | None) -> list[str]:
    """The command of a client's SuperNode."""
    command = ["flower-supernode", "--superlink", f"{host}:{port}", "--port", str(free_port())]
    command += ["--node-config", f'home="{home.path.resolve()}"']
    if key is None:
        return [*command, "--insecure"]
    for file in (key, federation.certificate):
        if not file.is_file():
            raise BadInput(f"{file} is missing; the federation's README.md says who makes it (or give --insecure)")
    return [
        *command,
        "--root-certificates",
        str(federation.certificate.resolve()),
        "--auth-supernode-private-key",
        str(key.resolve()),
    ]


def check_certificate(federation: Federation, host: str, port: int) -> None:
    """What a server there shows of itself is signed by the federation's authority, for this host, and has not expired: Flower's own
    processes try for ever otherwise, and say so in their log alone. A server that is not there yet is none that is wrong.

    Raises:
        BadInput: why it is not to be trusted.
    """
    where = f"{host}, port {port}"
    try:
        with socket.create_connection((host, port), HANDSHAKE) as plain:
            context = ssl.create_default_context(cafile=str(federation.certificate))
            context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        raise BadInput(
            f"{where}: the server's certificate is not to be trusted: {error.verify_message}; on the server make-certificates.sh "
            f"makes one anew where the folder tls was removed, and each client needs its tls/ca.crt as {federation.certificate}"
        ) from error
    except ssl.SSLError as error:
        raise BadInput(f"{where}: what answers there speaks no TLS; give --insecure if the server was started so") from error
    except OSError:
        return


class Control:
    """Flower's command line for a SuperLink."""

    def __init__(self, federation: Federation, port: int, secure: bool) -> None:
        self.check = partial(check_certificate, federation, "127.0.0.1", port) if secure else None
        self.environment = flower_home(federation.server)
        where = Path(self.environment["FLWR_HOME"])
        where.mkdir(parents=True, exist_ok=True)
        how = f"root-certificates = {json.dumps(str(federation.certificate.resolve()))}" if secure else "insecure = true"
        lines = ["[superlink]", f'default = "{CONNECTION}"', f"[superlink.{CONNECTION}]", f'address = "127.0.0.1:{port}"', how]
        (where / "config.toml").write_text("\n".join(lines) + "\n")

    def __call__(self, *words: str) -> Any:
        """What a command says. RunFailed: it fails."""
        command = ["flwr", *words, "--format", "json"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            found = {}
        if done.returncode or not found or found.get("success") is False:
            said = found.get("error-message") or done.stderr.strip() or done.stdout.strip()
            raise RunFailed(f"flwr {' '.join(words[:2])}: {' '.join(str(said).split())[-300:]}")
        return found

    def wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Until the SuperLink answers. RunFailed: it does not; BadInput: its certificate is no good."""
        end = time.monotonic() + UP
        while True:
            if self.check is not None:
                self.check()
            try:
                self("list", CONNECTION)
                return
            except RunFailed as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise RunFailed(f"the SuperLink does not start: {error}; see {log}") from error
                time.sleep(0.5)

    def register(self, keys: Mapping[str, Path]) -> None:
        """Let in the nodes of these clients, by name; those that are in already stay."""
        listed = self("supernode", "list", CONNECTION).get("nodes", [])
        known = {each.get("name") for each in listed}
        for name, key in keys.items():
            if name not in known:
                self("supernode", "register", str(key), CONNECTION, "--name", name)

    def start(self, app: Path) -> int:
        """Start the app; the number of Flower's run."""
        return int(self("run", str(app), CONNECTION)["run-id"])

    def state(self, run: int) -> str:
        """Of a run: pending, starting, running, or finished and how."""
        found = self("list", CONNECTION, "--run-id", str(run))
        return str(found["runs"][0]["status"])


def executable(name: str) -> str:
    """A console script of this environment. BadInput: Flower is not installed."""
    found = Path(sys.executable).with_name(name)
    if not found.exists():
        raise BadInput("Flower is not installed here; pip install 'fedlora[flower]'")
    return str(found)


def follow(files: Mapping[Path, Callable[[str], None]]) -> Iterator[None]:
    """Tell of each line that is added to files from now on, whenever the next item is asked for."""
    places = {file: file.stat().st_size if file.exists() else 0 for file in files}
    while True:
        for file, tell in files.items():
            if file.exists():
                with open(file, "rb") as stream:
                    stream.seek(places[file])
                    whole = stream.read().rpartition(b"\n")
                places[file] += len(whole[0]) + len(whole[1])
                for line in whole[0].decode("utf-8", "replace").split("\n") if whole[1] else ():
                    tell(line)
        yield
