"""What Flower starts on the server and, for each message, on a client: nothing here needs torch before there is something to do."""

from typing import Any

from fedlora.runs.federation.session import worker_command
from fedlora.transports.flower.apps import client_app, server_app


def _play(grid: Any) -> None:
    from fedlora.runs.federation.server import play

    play(grid)


client = client_app(worker_command)
server = server_app(_play)
