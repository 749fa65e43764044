"""The folder of a federation, which every party has a copy of; and the home of a client, which never leaves its machine."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import Config, read_recipe, resolve
from fedlora.disk import write_whole
from fedlora.errors import BadInput, unknown
from fedlora.runs.roster import client_ranks
from fedlora.signals import alive
from fedlora.types import Client

CONFIG, OUTLINE = "federation.toml", "outline.fed"
EACH = "each client's own"  # the data of a federation's configuration


@dataclass(frozen=True)
class Federation:
    """The folder of a federation."""

    path: Path

    @property
    def config(self) -> Config:
        """BadInput: this is no such folder."""
        file = self.path / CONFIG
        if not file.is_file():
            raise BadInput(f"{self.path} is no federation's folder: it has no {CONFIG}; fedlora federate init makes one")
        config = resolve(read_recipe(str(file)))
        if not config.clients.names:
            raise BadInput(f"{file}: clients.names is missing: who takes part")
        client_ranks(config.clients, len(config.clients.names))
        return config

    @property
    def outline(self) -> Path:
        return self.path / OUTLINE

    @property
    def model(self) -> Path:
        """The model's configuration and what makes its inputs."""
        return self.path / "model"

    @property
    def app(self) -> Path:
        """Flower's app."""
        return self.path / "app"

    @property
    def keys(self) -> Path:
        """The clients' public keys, as the operator has them."""
        return self.path / "keys"

    @property
    def certificate(self) -> Path:
        """By which clients know the server."""
        return self.path / "tls" / "ca.crt"

    @property
    def server(self) -> Path:
        """What is the server's alone."""
        return self.path / "server"


def roster(config: Config) -> list[Client]:
    """The clients with their numbers and ranks, in the order of their names; how much they have they will say."""
    names = config.clients.names or []
    return [Client(i, rank, 0) for i, rank in enumerate(client_ranks(config.clients, len(names)))]


def number_of(config: Config, name: str) -> int:
    """Of a client by its name. BadInput says who there is."""
    names = config.clients.names or []
    if name not in names:
        raise unknown("client", name, names)
    return names.index(name)


@dataclass(frozen=True)
class Home:
    """The folder of one client, on its own machine: what it keeps between rounds, the log of its worker, and `home.json`, which
    says where the federation's folder, its data and its model are, and the process that takes part with it."""

    path: Path

    def write(self, federation: Path, name: str, data: str, model: str, threads: int | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        what = {"federation": str(federation.resolve()), "name": name, "data": data, "model": model, "threads": threads}
        what["process"] = os.getpid()
        write_whole(self.path / "home.json", json.dumps(what, indent=1).encode())

    def read(self) -> dict[str, Any]:
        """BadInput: this is no such folder."""
        try:
            found: dict[str, Any] = json.loads((self.path / "home.json").read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.path} is no client's home: it has no home.json; fedlora federate client makes one") from error
        return found

    def attended(self) -> bool:
        """Whether the process that takes part with it is there."""
        with suppress(BadInput, KeyError):
            return alive(self.read()["process"])
        return False


def absolute(source: str) -> str:
    """A source of data or a model as it is found from anywhere: a path whole, a name as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def flower_home(folder: Path) -> dict[str, str]:
    """The environment of Flower's processes, whose files lie in a folder of ours: no news is sent, and none is looked for."""
    import sys

    own = {"FLWR_HOME": str(folder / "flower"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    own |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "PYTHONUNBUFFERED": "1"}
    return os.environ | own | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def host_and_port(address: str, port: int) -> tuple[str, int]:
    """Of "host" or "host:port". BadInput: it is neither."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+)(?::(\d{1,5}))?", address)
    if found is None or not 0 < int(found[2] or port) < 1 << 16:
        raise BadInput(
            f"'{address}' is no address; possible: a host's name or number, and perhaps its port, as in fl.example.org:9092"
        )
    return found[1], int(found[2] or port)
