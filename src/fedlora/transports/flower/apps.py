"""What Flower starts: the server's loop, and, for each message to a client, a process that hands it to the client's worker."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.clients.reach import LARGEST, WorkerDied, ask
from fedlora.transports.flower.payload import bytes_of, content, lost, pack, unpack

HOME = "home"  # of a client, in its node's configuration


def server_app(play: Callable[[Grid], None]) -> ServerApp:
    """Plays a federation over the grid that Flower gives."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        play(grid)

    return app


def client_app(command: Callable[[Path], Sequence[str]]) -> ClientApp:
    """Answers each message with what the worker of this node's home answers, which `command` starts where there is none."""
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def query(message: Message, context: Context) -> Message:
        home = Path(str(context.node_config[HOME]))
        mark = home / f"asking-{os.getpid()}"  # by which one sees that this process was killed
        mark.touch()
        try:
            found = pack(ask(home, command(home), unpack(bytes_of(message.content), LARGEST)))
        except (WorkerDied, ValueError) as error:  # said at once, for Flower would wait for an hour
            found = lost(str(error))
        finally:
            mark.unlink(missing_ok=True)
        return Message(content(found), reply_to=message)

    return app
