"""How an operator started the server: what the app that Flower starts reads, and where it says how it goes. No torch."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlora.disk import write_whole

SESSION = "FEDLORA_SESSION"  # the environment variable that names the file
STATUS = "status.json"  # how it goes
ENDED = "ended.json"  # how it ended
LOG = "run.log"  # what it says to people


@dataclass(frozen=True)
class Session:
    """
    Attributes:
        out: the run's folder.
        model: where the weights are; None of a server without them.
        registered: nodes have keys.
    """

    federation: str
    out: str
    resume: bool
    model: str | None
    registered: bool

    def write(self, file: Path) -> None:
        write_whole(file, json.dumps(asdict(self), indent=1).encode())


def read(file: Path) -> Session:
    return Session(**json.loads(file.read_text()))


def worker_command(home: Path) -> Sequence[str]:
    """What starts the worker of a client's home."""
    return [sys.executable, "-m", "fedlora.runs.federation.node", str(home)]
