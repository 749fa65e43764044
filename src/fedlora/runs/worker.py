"""A process that plays some clients of a run in a folder: `python -m fedlora.runs.worker FOLDER NUMBER`."""

import os
import sys
from pathlib import Path

from filelock import FileLock

from fedlora.clients.serve import classes, serve
from fedlora.clients.worker import Worker
from fedlora.config import read_run
from fedlora.listener import Quiet
from fedlora.messages import Transport
from fedlora.runs.connect import Connect, make_worker
from fedlora.runs.context import RunContext
from fedlora.runs.folder import check_roster
from fedlora.runs.prepare import prepare
from fedlora.runs.saved import STATES
from fedlora.transports.processes import Processes


def processes(count: int, patience: float = 600.0, retries: int = 3) -> Connect:
    """Clients are played by so many processes, which share the folder of what clients keep."""

    def connect(context: RunContext, worker: Worker, out: Path) -> Transport:
        def command(number: int) -> list[str]:
            return [sys.executable, "-m", "fedlora.runs.worker", str(out), str(1 + number)]  # 0 is the server's own

        return Processes(command, count, classes(context.method), retries, patience)

    return connect


def main(out: Path, number: int) -> None:
    """Answer asks from standard input until it ends."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no message
        context = prepare(read_run(out), Quiet(), out)
        context.trainer.rows = check_roster(context.roster, out)
        (out / STATES).mkdir(exist_ok=True)
        with FileLock(out / STATES / f"worker-{number}.lock"):  # one that outlived its server may not have noticed yet
            serve(make_worker(context, out / STATES, number), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
