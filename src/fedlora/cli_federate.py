"""`fedlora federate`: federations between machines, over Flower."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.disk import require_place
from fedlora.names import counted

app = typer.Typer(
    name="federate",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune over machines that do not share their data. Needs `pip install 'fedlora[flower]'`.",
)

PORT = 9092
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder, which `init` makes.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and keys: to try things on one machine.")]
Model = Annotated[str | None, typer.Option("--model", metavar="M", help="Where the model is on this machine.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make; never overwritten.")],
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A TOML file, or a packaged recipe.")] = None,
    clients: Annotated[str, typer.Option("--clients", metavar="A,B,C", help="Who takes part, by name.")] = "",
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="An example of what clients have: columns, and all classes.")
    ] = None,
    labels: Annotated[str, typer.Option("--labels", metavar="X,Y", help="The classes, instead of an example.")] = "",
    task: Annotated[str | None, typer.Option("--task", metavar="T")] = None,
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="See `fedlora methods`.")] = None,
    rank: Annotated[str | None, typer.Option("--rank", metavar="N", help="A number, or a list in the order of names.")] = None,
    model: Model = None,
    rounds: Annotated[int | None, typer.Option("--rounds", metavar="T")] = None,
    server: Annotated[
        str, typer.Option("--server", metavar="HOST:PORT", help="By which clients reach the server; into the README.")
    ] = "localhost",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key, as in train.batch_size=16.")
    ] = None,
) -> None:
    """Make a federation's folder: its configuration, the model's outline, and all that server and clients need to start.

    Example: `fedlora federate init wards --clients north,south,west --data example.csv --method lora-a2 --rounds 20`
    """
    require_place("DIR", folder)
    from fedlora.api import configure
    from fedlora.report.progress import Progress
    from fedlora.runs.federation.folder import host_and_port
    from fedlora.runs.federation.init import init as make
    from fedlora.tables import setting, settings

    names = [name.strip() for name in clients.split(",") if name.strip()]
    flags: dict[str, Any] = {
        "task.name": task,
        "method.name": method,
        "model.source": model,
        "data.source": data,
        "train.rounds": rounds,
        "clients.names": names or None,
    }
    layers = [setting(f"{key}={json.dumps(value)}") for key, value in flags.items() if value is not None]
    layers += [setting(f"clients.rank={rank}")] if rank is not None else []
    layers.append(settings(set_ or []))
    address = host_and_port(server, PORT)
    with Progress(quiet=False) as progress:
        make(folder, configure(recipe, layers, None), [x.strip() for x in labels.split(",") if x.strip()], address, progress)
    print(f"made {folder}; {folder / 'README.md'} says what the server and each client do")


@app.command()
def server(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", metavar="RUN", help="The run's folder; DIR/server/run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run where there is one.")] = False,
    host: Annotated[
        str, typer.Option("--host", metavar="IP", help="Where to listen; 0.0.0.0 for everywhere, see the README.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=1, max=65535)] = PORT,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="The model's weights, for methods that need them on the server.")
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Play the federation's rounds on this machine, until they are done.

    Example: `fedlora federate server wards --port 9092 --resume`
    """
    from fedlora.comparison.run import write_report
    from fedlora.runs.federation.folder import Federation
    from fedlora.runs.federation.operate import serve, to_stdout
    from fedlora.signals import exit_status, terminable
    from fedlora.summary import last_line, read_metrics

    federation = Federation(folder)
    run = out or federation.server / "run"
    try:
        with terminable():
            summary = serve(federation, run, resume, model, not insecure, (host, port), to_stdout)
    except KeyboardInterrupt as stop:
        typer.echo(f"stopped; the same command goes on{'' if resume else ' with --resume'}", err=True)
        raise SystemExit(exit_status(stop)) from None
    write_report([run], None)
    where = "each client's model is its own" if "clients" in summary else f"result in {run / summary['result']}"
    print(f"{last_line(summary, read_metrics(run))}  {where}")


@app.command()
def client(
    folder: Folder,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Which of the federation's clients this is.")],
    data: Annotated[str, typer.Option("--data", metavar="D", help="A file, or a folder of train and test files.")],
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server is.")] = "localhost",
    model: Model = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="The private key; DIR/keys/NAME.")] = None,
    home: Annotated[Path | None, typer.Option("--home", metavar="HOME", help="What it keeps; DIR/home-NAME.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="Of the worker; all cores.")] = None,
    insecure: Insecure = False,
) -> None:
    """Take part in a federation from this machine, until it is stopped.

    Example: `fedlora federate client wards --name north --data north.csv --server fl.example.org:9092`
    """
    from fedlora.runs.federation.folder import Federation, Home, host_and_port
    from fedlora.runs.federation.operate import attend, to_stdout
    from fedlora.signals import exit_status, terminable

    private = None if insecure else key or folder / "keys" / name
    own = Home((home or folder / f"home-{name}").resolve())
    try:
        with terminable():
            attend(Federation(folder), own, name, data, model, private, host_and_port(server, PORT), threads, to_stdout)
    except KeyboardInterrupt as stop:
        typer.echo("stopped; the same command goes on", err=True)
        raise SystemExit(exit_status(stop)) from None


@app.command()
def status(
    folder: Folder,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every other second, until it is done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Say who is there, which round it is, what failed, and how long it will take.

    Example: `fedlora federate status wards --watch`
    """
    from rich.console import Console
    from rich.live import Live

    from fedlora.runs.federation.folder import Federation
    from fedlora.runs.federation.status import OVER, shown
    from fedlora.runs.federation.status import status as look

    federation = Federation(folder)
    found = look(federation)
    if as_json:
        print(json.dumps(found))
    elif not watch:
        Console(highlight=False).print(shown(found))
    else:
        with Live(shown(found), console=Console(highlight=False)) as live:
            while not found["stage"].startswith(OVER):
                time.sleep(2)
                found = look(federation)
                live.update(shown(found))


@app.command()
def export(
    folder: Folder,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Which client this machine is.")],
    to: Annotated[Path, typer.Option("--to", metavar="OUT", help="The folder to make.")],
    home: Annotated[Path | None, typer.Option("--home", metavar="HOME", help="What it keeps; DIR/home-NAME.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model instead of an adapter.")] = False,
) -> None:
    """Write the model of this machine's client: its own, where the method gives it one. It never leaves this machine.

    Example: `fedlora federate export wards --name north --to north-adapter`
    """
    require_place("--to", to)
    from fedlora.runs.federation.folder import Home
    from fedlora.runs.federation.own import export as write

    kind, whose, rounds = write(Home(home or folder / f"home-{name}"), name, to, merged)
    print(f"{kind} of {whose}, after {counted(rounds, 'round')}: {to}")
