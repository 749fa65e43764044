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
from fedlora.runs.federation import guard
from fedlora.runs.federation.folder import Federation, Home, flower_home

CONNECTION = "fedlora"  # the name of the SuperLink in Flower's configuration
GOODBYE = 10.0  # seconds that a process has to end by itself
UP = 60.0  # seconds within which a SuperLink answers
HANDSHAKE = 10.0  # seconds within which a server does


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its own group, all of which ends with the block, or with this process where that is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", guard.__name__, *command],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)
        assert process.stdin is not None
        process.stdin.close()


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
    _check_pair(federation.certificate.with_name("server.crt"), federation.certificate.with_name("server.key"))
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


def _check_pair(certificate: Path, key: Path) -> None:
    """BadInput: a certificate and a private key that do not belong together, or are none."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        why = "does not belong to" if error.reason == "KEY_VALUES_MISMATCH" else "cannot be read with"
        raise BadInput(
            f"{key} {why} {certificate}; bring back the one that does, or remove the folder {key.parent} and make it anew with "
            "make-certificates.sh"
        ) from error


def check_server(federation: Federation, host: str, port: int, secure: bool) -> bool:
    """Whether a server is there. It speaks as this client does, and what it shows is signed by the federation's authority, for this
    host, and has not expired: Flower's own processes try for ever otherwise, and say so in their log alone.

    Raises:
        BadInput: why it cannot be joined so, or is not to be trusted.
    """
    where = f"{host}, port {port}"
    context = ssl.create_default_context(cafile=str(federation.certificate) if secure else None)
    if not secure:  # only whether it speaks TLS
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        plain = socket.create_connection((host, port), HANDSHAKE)
    except OSError:
        return False
    try:
        context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        raise BadInput(
            f"{where}: the server's certificate is not to be trusted: {error.verify_message}; on the server make-certificates.sh "
            f"makes one anew where the folder tls was removed, and each client needs its tls/ca.crt as {federation.certificate}"
        ) from error
    except ssl.SSLError as error:
        if secure:
            raise BadInput(f"{where}: what answers there speaks no TLS; give --insecure if the server was started so") from error
        return True
    except OSError:  # it goes just now, or, without TLS, has no patience with a handshake
        return not secure
    finally:
        plain.close()
    if not secure:
        raise BadInput(f"{where}: the server speaks TLS, and is joined with a key; leave --insecure out")
    return True


class Control:
    """Flower's command line for a SuperLink."""

    def __init__(self, federation: Federation, port: int, secure: bool) -> None:
        self.check = partial(check_server, federation, "127.0.0.1", port, secure)
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
            self.check()
            try:
                self("list", CONNECTION)
                return
            except RunFailed as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise RunFailed(f"the SuperLink does not start: {error}; see {log}") from error
                time.sleep(0.5)

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
    return _follow(files, {file: file.stat().st_size if file.exists() else 0 for file in files})


def _follow(files: Mapping[Path, Callable[[str], None]], places: dict[Path, int]) -> Iterator[None]:
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
