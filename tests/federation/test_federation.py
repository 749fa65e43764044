"""Federations over Flower, in an environment beside `.venv` that has it."""

import csv
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hosts
import pytest
import side
import tiny
import torch
from safetensors.torch import load_file

from fedlora.clients import reach
from fedlora.config import resolve
from fedlora.listener import Quiet
from fedlora.runs.federation import guard
from fedlora.runs.play import execute
from fedlora.summary import read_rows

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
NAMES = ("north", "south", "west")


@pytest.fixture(scope="session")
def python() -> Path:
    return side.python("flower", side.extra("flower"))


def test_federations_over_a_grid(python: Path) -> None:
    """The cases of `over_grid.py`."""
    side.passes(python, HERE / "over_grid.py")


class Place:
    """A folder with a model and clients' files, and what runs in it."""

    def __init__(self, root: Path, python: Path, port: int) -> None:
        self.root, self.python, self.port = root, python, port
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def command(self, *words: object) -> list[str]:
        return [str(self.python), "-m", "fedlora", "federate", *map(str, words)]

    def fedlora(self, *words: object, status: int = 0) -> str:
        done = subprocess.run(
            self.command(*words), cwd=self.root, env=side.environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name: str, *words: object, host: Sequence[str] = ()) -> None:
        with open(self.root / f"{name}.out", "ab") as log:
            command = [*host, *self.command(*words)]
            self.running[name] = subprocess.Popen(
                command, cwd=self.root, env=side.environment(), stdout=log, stderr=log, start_new_session=True
            )

    def server(self, *more: object) -> None:
        self.start("server", "server", "fed", "--port", self.port, "--resume", *more)

    def client(self, name: str, *more: object) -> None:
        self.start(
            name, "client", "fed", "--name", name, "--data", name, "--server", f"127.0.0.1:{self.port}", "--threads", 1, *more
        )

    def said(self, name: str) -> str:
        file = self.root / f"{name}.out"
        return file.read_text() if file.exists() else ""

    def until(self, what: Callable[[], Any], seconds: float = 240.0, every: float = 0.2) -> Any:
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, "\n".join(f"== {name}\n{self.said(name)}" for name in ("server", *NAMES))
            time.sleep(every)
        return found

    def rounds(self) -> int:
        file = self.root / "fed" / "server" / "run" / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def stop(self, name: str) -> int:
        process = self.running.pop(name)
        process.terminate()
        return process.wait(60)

    def found(self, *words: str, guards: bool = True) -> list[int]:
        """The processes of this place whose command has these words; without `guards`, those alone that do the work."""
        out = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                except OSError:
                    continue
                if all(word in line for word in words) and (guards or guard.__name__ not in line):
                    out.append(int(entry.name))
        return out


@pytest.fixture
def place(tmp_path: Path, python: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    """With five rounds and five minutes for each, unless the test says otherwise."""
    keys = {"rounds": 5, "timeout": 5, **getattr(request, "param", {})}
    tiny.save_model("bert", tmp_path / "base")
    tiny.save_data(tmp_path)
    (tmp_path / "all").mkdir()
    for part in ("train", "test"):
        rows = list(csv.DictReader((tmp_path / f"{part}.csv").read_text().splitlines()))
        whole = [["text", "label", "owner"]]
        for i, name in enumerate(NAMES):
            (tmp_path / name).mkdir(exist_ok=True)
            own = [[row["text"], row["label"]] for row in rows[i::3]]
            with open(tmp_path / name / f"{part}.csv", "w", newline="") as file:
                csv.writer(file).writerows([["text", "label"], *own])
            whole += [[*row, name] for row in own]
        with open(tmp_path / "all" / f"{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows(whole)
    found = Place(tmp_path, python, free_port())
    words = [
        "--method",
        "lora-a2",
        "--rank",
        "[2, 4, 8]",
        "--rounds",
        keys["rounds"],
        "--model",
        "base",
        "--server",
        f"127.0.0.1:{found.port}",
    ]
    sets = ("train.rows=1", "train.lr=5e-3", "precision=fp32", "transport.start=3", f"transport.timeout={keys['timeout']}")
    found.fedlora("init", "fed", "--clients", ",".join(NAMES), "--data", "all", *words, *(x for s in sets for x in ("--set", s)))
    yield found
    for process in found.running.values():
        process.terminate()
    for process in found.running.values():
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def certified(place: Place) -> None:
    """Certificates, and a key for each client, as the README says."""
    subprocess.run(["sh", "fed/make-certificates.sh", "127.0.0.1"], cwd=place.root, check=True)
    for name in NAMES:
        subprocess.run(["sh", "fed/make-key.sh", name], cwd=place.root, check=True)


def in_one_process(root: Path) -> Path:
    """The same run without any network."""
    tables = {
        "precision": "fp32",
        "method": {"name": "lora-a2"},
        "model": {"source": str(root / "base")},
        "data": {"source": str(root / "all"), "partition": "column", "column": "owner"},
        "clients": {"rank": [2, 4, 8]},
        "train": {"rounds": 5, "lr": 5e-3, "rows": 1},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    execute(resolve(tables), root / "one", False, Quiet())
    torch.set_num_threads(threads)
    return root / "one"


def test_it_survives_whatever_is_killed_and_ends_with_the_same_bits(place: Place) -> None:
    """With TLS and keys: the SuperLink, the server's app, a worker, a SuperNode and the app of a message are killed in turn, and a
    node without a key of the federation's stays out."""
    certified(place)
    place.server()
    place.until(lambda: "listening" in place.said("server"))
    for name in NAMES:
        place.client(name)
    place.until(lambda: place.rounds() >= 1)
    (link,) = place.found("flower-superlink", str(place.root), guards=False)
    os.kill(link, signal.SIGKILL)
    assert place.running.pop("server").wait(60) == 1 and "start the server again with --resume" in place.said("server")
    place.server()
    place.until(lambda: place.rounds() >= 2)
    app = json.loads((place.root / "fed/server/status.json").read_text())["pid"]
    os.kill(app, signal.SIGKILL)
    assert place.running.pop("server").wait(120) == 1 and "the server's app ended" in place.said("server")
    place.server()
    place.until(lambda: place.rounds() >= 3)
    os.kill(int((reach.place_of(place.root / "fed/home-north") / reach.PID).read_text()), signal.SIGKILL)
    for pid in place.found("flower-supernode", "home-south", guards=False):
        os.kill(pid, signal.SIGKILL)
    asking = place.until(lambda: list((place.root / "fed/home-west").glob("asking-*")), every=0.002)
    os.kill(int(asking[0].name.partition("-")[2]), signal.SIGKILL)
    assert place.running.pop("server").wait(300) == 0, place.said("server")
    assert "was killed; the node starts anew" in place.said("west")
    one, run = in_one_process(place.root), place.root / "fed/server/run"
    a, b = (load_file(each / "adapter/adapter_model.safetensors") for each in (one, run))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for ours, theirs in zip(read_rows(run), read_rows(one), strict=True):
        assert (ours["accuracy"], ours["loss"], ours["upload_bytes"]) == (
            theirs["accuracy"],
            theirs["loss"],
            theirs["upload_bytes"],
        )
        assert ours["failed"] == 0
    said = place.fedlora("status", "fed")
    assert "done" in said and "5 of 5" in said and "north" in said
    place.fedlora("export", "fed", "--name", "west", "--to", "west-adapter")
    assert (place.root / "west-adapter" / "adapter_model.safetensors").exists()
    assert "the server says: all is done, after 5 rounds" in place.said("south")
    for name in NAMES[:2]:
        assert place.stop(name) in (130, 143)
    west = place.running.pop("west")
    west.kill()  # what it has started ends with it
    west.wait()
    place.until(lambda: not place.found(str(place.root)), 60)


def test_who_has_no_key_or_another_authority_stays_out(place: Place) -> None:
    certified(place)
    place.server()
    place.until(lambda: "listening" in place.said("server"))
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", "other"], cwd=place.root, check=True)
    # It might have been let in before: it tries for a while.
    said = place.fedlora(
        *("client", "fed", "--name", "north", "--data", "north", "--server", f"127.0.0.1:{place.port}", "--key", "other"), status=1
    )
    assert "the server does not know its key" in said
    # An authority of somebody else's: what the server shows of itself is not signed by it.
    ours = place.root / "fed/tls/ca.crt"
    right = ours.read_text()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "x.key", "-out", str(ours), "-subj", "/CN=x"],
        cwd=place.root,
        check=True,
        capture_output=True,
    )
    south = ("client", "fed", "--name", "south", "--data", "south", "--server")
    said = place.fedlora(*south, f"127.0.0.1:{place.port}", status=2)
    assert f"127.0.0.1, port {place.port}: the server's certificate is not to be trusted" in said and "make-certificates.sh" in said
    ours.write_text(right)
    said = place.fedlora(*south, f"127.0.0.1:{place.port}", "--insecure", status=2)
    assert "the server speaks TLS, and is joined with a key; leave --insecure out" in said
    said = place.fedlora("status", "fed")
    assert "not seen yet" in said and "waiting for 3 clients" in said
    assert place.stop("server") in (130, 143)
    assert "stopped; the same command goes on\n" in place.said("server")
    assert "stopped: no server runs here" in place.fedlora("status", "fed")
    other = place.root / "fed/tls/server.key"
    other.write_text((place.root / "x.key").read_text())
    said = place.fedlora("server", "fed", "--port", place.port, "--resume", status=2)
    assert "server.key does not belong to fed/tls/server.crt" in said


@pytest.mark.parametrize("place", [{"rounds": 6, "timeout": 0.4}], indirect=True)
def test_a_client_that_is_slow_and_one_that_joins_otherwise(place: Place) -> None:
    """Without TLS. A client comes before the server; the worker of one is stopped for longer than the timeout, and its answer is
    late; each says on its own machine how it stands."""
    place.client("north", "--insecure")
    place.until(lambda: "no server is there now; the node goes on trying" in place.said("north"))
    place.server("--insecure")
    for name in NAMES[1:]:
        place.client(name, "--insecure")
    place.until(lambda: place.rounds() >= 1)
    worker = int((reach.place_of(place.root / "fed/home-west") / reach.PID).read_text())
    os.kill(worker, signal.SIGSTOP)
    place.until(lambda: any(row["failed"] for row in read_rows(place.root / "fed/server/run")))
    os.kill(worker, signal.SIGCONT)
    assert place.running.pop("server").wait(300) == 0, place.said("server")
    rows = read_rows(place.root / "fed/server/run")
    failed = [row["failures"] for row in rows if row["failed"]]
    assert len(rows) == 6 and failed and all(list(why) == ["2"] for why in failed), rows
    assert any("no answer within 0.4 minutes" in why["2"] for why in failed)
    assert re.search(r"note: round \d, west: no answer within 0.4 minutes", place.said("server"))
    for name in NAMES:
        said = place.said(name)
        assert "the server has greeted it" in said and "round 1: trained in" in said and "all is done, after 6 rounds" in said
        assert place.stop(name) in (130, 143)


def test_a_certificate_that_has_expired(place: Place) -> None:
    """The server does not start with it, and a client does not join one that shows it."""
    certified(place)
    tls, good = place.root / "fed/tls", (place.root / "fed/tls/server.crt").read_text()
    expire(tls)
    said = place.fedlora("server", "fed", "--port", place.port, status=2)
    assert "certificate has expired" in said and "make-certificates.sh" in said
    shown = (tls / "server.crt").read_text()
    (tls / "server.crt").write_text(good)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (place.root / "expired.crt").write_text(shown)
    context.load_cert_chain(place.root / "expired.crt", tls / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                pass

        threading.Thread(target=answer, daemon=True).start()
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        said = place.fedlora("client", "fed", "--name", "south", "--data", "south", "--server", where, status=2)
    assert "certificate has expired" in said


@pytest.mark.skipif(not hosts.HERE, reason="needs root and ip")
@pytest.mark.parametrize("place", [{"rounds": 12, "timeout": 0.4}], indirect=True)
def test_a_host_that_is_cut_off_for_two_rounds(place: Place) -> None:
    """Four hosts. The rounds go on without the one whose cable is out, say so, and go on with it when it is back."""
    subprocess.run(["sh", "fed/make-certificates.sh", hosts.HUB], cwd=place.root, check=True)
    for name in NAMES:
        subprocess.run(["sh", "fed/make-key.sh", name], cwd=place.root, check=True)
    with hosts.hosts(NAMES) as net:
        place.start("server", "server", "fed", "--host", "0.0.0.0", "--port", place.port, host=net.on("hub"))
        place.until(lambda: "listening" in place.said("server"))
        for name in NAMES:
            where = ("--server", f"{hosts.HUB}:{place.port}", "--threads", 1)
            place.start(name, "client", "fed", "--name", name, "--data", name, *where, host=net.on(name))
        place.until(lambda: place.rounds() >= 2)
        net.cut("west")
        away = place.rounds()
        place.until(lambda: place.rounds() >= away + 3)  # the one under way may have had its answer
        net.join("west")
        assert place.running.pop("server").wait(400) == 0, place.said("server")
        for name in NAMES:
            assert place.stop(name) in (130, 143)
    rows = read_rows(place.root / "fed/server/run")
    failed = {row["round"]: row["failures"] for row in rows if row["failed"]}
    assert len(rows) == 12 and len(failed) >= 2, rows
    assert all(list(why) == ["2"] and "no answer within" in why["2"] for why in failed.values()), failed
    assert not rows[0]["failed"] and not rows[-1]["failed"]
    assert (place.root / "fed/server/run/adapter/adapter_model.safetensors").exists()


def expire(tls: Path) -> None:
    """Make the server's certificate one of yesterday, signed by the same authority."""
    now = datetime.now(UTC)
    dates = [(now - timedelta(days=days)).strftime("%Y%m%d%H%M%SZ") for days in (9, 1)]
    (tls / "ca.cnf").write_text(
        "[ca]\ndefault_ca=own\n[own]\nnew_certs_dir=.\ndatabase=index.txt\nrand_serial=yes\ndefault_md=sha256\npolicy=any\n"
        "x509_extensions=more\n[any]\ncommonName=supplied\n[more]\nsubjectAltName=IP:127.0.0.1\n"
    )
    (tls / "index.txt").touch()
    request = ["openssl", "req", "-new", "-key", "server.key", "-subj", "/CN=127.0.0.1", "-out", "server.csr"]
    sign = ["openssl", "ca", "-batch", "-notext", "-config", "ca.cnf", "-cert", "ca.crt", "-keyfile", "ca.key", "-in", "server.csr"]
    for command in (request, [*sign, "-startdate", dates[0], "-enddate", dates[1], "-out", "server.crt"]):
        subprocess.run(command, cwd=tls, check=True, capture_output=True)
