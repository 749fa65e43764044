"""The command line. Everything heavy is imported inside the commands, so that `fedlora --help` is quick."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fedlora.errors import BadInput, RunFailed, unknown

app = typer.Typer(
    name="fedlora",
    help="Federated LoRA fine-tuning: every published method behind one contract.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Setting = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key, as in train.batch_size=16.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="S")]
Clients = Annotated[int | None, typer.Option("--clients", metavar="K", help="Number of clients.")]
Alpha = Annotated[float | None, typer.Option("--alpha", metavar="A", help="Dirichlet's alpha: smaller is more heterogeneous.")]


@app.command()
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A TOML file, or a packaged recipe: demo.")] = None,
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="See `fedlora methods`.")] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", metavar="N", help="A number, a list by client, or a plan: tiers, heavy-tail, normal.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="minilm, a local folder, or a Hub id.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="banking77, 20newsgroups, a file, a folder, or a Hub id.")
    ] = None,
    clients: Clients = None,
    alpha: Alpha = None,
    rounds: Annotated[int | None, typer.Option("--rounds", metavar="T")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="E", help="Local epochs in a round.")] = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; made, never overwritten.")] = None,
    set_: Setting = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Leave trace.json.gz of one round, for chrome://tracing or ui.perfetto.dev.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the last line only.")] = False,
) -> None:
    """Fine-tune a model over clients that share only small updates.

    Examples: `fedlora run demo` and

    `fedlora run --data banking77 --method lora-a2 --rank 1 --alpha 0.01 --clients 30 --out runs/first`
    """
    from fedlora.config import read_recipe, resolve, setting

    flags = {
        "method.name": method,
        "clients.rank": rank,
        "model.source": model,
        "data.source": data,
        "clients.count": clients,
        "data.alpha": alpha,
        "train.rounds": rounds,
        "train.epochs": epochs,
        "seed": seed,
    }
    layers = [_one_run(recipe, read_recipe(recipe))] if recipe else []
    if resume:
        if out is None:
            raise BadInput("--resume needs --out, the folder of the run to go on with")
        if recipe is None and not out.exists():
            raise BadInput(f"--resume: there is no run in {out} to go on with; to start one, name a recipe or leave --resume out")
        if (out / "config.toml").exists():
            layers.insert(0, read_recipe(str(out / "config.toml")))
    layers += [
        setting(f"{key}={json.dumps(value) if not _is_toml(key, value) else value}")
        for key, value in flags.items()
        if value is not None
    ]
    layers += [setting(each) for each in set_ or []]
    config = resolve(*layers)
    folder = out if out is not None else _free_folder(recipe or config.method.name, config)
    _execute(config, folder, resume, profile, quiet)


@app.command()
def compare(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A TOML file, or a packaged recipe: see --list.")] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", metavar="small|paper", help="How large; small where the recipe has it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder; compare/RECIPE-SCALE, and continued where it is there.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", metavar="J", min=1, help="Runs at a time, each in its own process. On a CPU one a core, up to 4; on a GPU 1."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key, as in train.rounds=3; a list is a grid.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="The packaged recipes, and how long they take.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the last line only.")] = False,
) -> None:
    """Run a grid of methods and settings, and set them side by side: a table, the pictures, and ours beside published numbers.

    A run that is complete is never run again, so the same command goes on where it was stopped.

    Examples: `fedlora compare --list` and

    `fedlora compare table1 --scale small`
    """
    from fedlora.compare.recipe import Scale
    from fedlora.compare.study import compare as start
    from fedlora.compare.study import listing
    from fedlora.config import setting

    if list_:
        print(listing())
        return
    if recipe is None:
        raise BadInput("no recipe: name a TOML file or a packaged recipe; `fedlora compare --list` shows these")
    scales = {each.value: each for each in Scale}
    if scale is not None and scale not in scales:
        raise unknown("--scale", scale, scales)
    again = f"; go on with: {shlex.join(['fedlora', *sys.argv[1:]])}"
    try:
        failed = start(recipe, scales.get(scale or ""), out, jobs, [setting(each) for each in set_ or []], quiet)
    except KeyboardInterrupt:
        _fail(f"stopped; what is complete is kept{again}", 130)
    except OSError as error:
        _fail(f"{error.filename or recipe}: {error.strerror or error}{again}", 1)
    if failed:
        raise SystemExit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of `fedlora compare`.")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="The page; report.html in RUN, or here for several.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about runs, and its pictures beside it.

    Example: `fedlora report runs/first runs/second --html both.html`
    """
    from fedlora.compare.study import write_report

    print(f"report: {write_report(runs, html)}")


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False) -> None:
    """List every method: paper, exact or not, mixed ranks, personal models, what crosses the wire.

    Example: `fedlora methods --json`
    """
    from dataclasses import fields

    from fedlora import methods as package

    found = {name: package.find(name).FACTS for name in package.names()}
    plain = ("title", "paper", "year", "exact", "mixed_ranks", "personal", "upload", "download", "server")
    if as_json:
        print(json.dumps([{"name": name} | {key: getattr(facts, key) for key in plain} for name, facts in found.items()], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "method",
        "paper",
        "year",
        "exact",
        "mixed ranks",
        "personal",
        "upload a module",
        "download a module",
        box=None,
        pad_edge=False,
    )
    tick = {True: "yes", False: "-"}
    for name, facts in found.items():
        table.add_row(
            name,
            facts.paper,
            str(facts.year),
            tick[facts.exact],
            tick[facts.mixed_ranks],
            tick[facts.personal],
            facts.upload,
            facts.download,
        )
    console = Console()
    console.print(table)
    settings = {name: [f.name for f in fields(package.find(name))] for name in found}
    console.print("\nSettings (--set method.NAME=VALUE):", highlight=False)
    for name, keys in settings.items():
        if keys:
            console.print(f"  {name}: {', '.join(keys)}", highlight=False)


@app.command()
def data(
    source: Annotated[str, typer.Argument(metavar="NAME_OR_PATH", help="A catalogue name, a file, a folder, or a Hub id.")],
    clients: Clients = None,
    alpha: Alpha = None,
    seed: Seed = None,
    picture: Annotated[Path, typer.Option("--picture", metavar="FILE", help="Where to write the picture.")] = Path("split.png"),
    set_: Setting = None,
) -> None:
    """Show how a data set is dealt to clients, before any training: a table, the statistics of the split, and a picture.

    Example: `fedlora data banking77 --clients 30 --alpha 0.01`
    """
    from fedlora.config import resolve, setting

    flags = {"data.source": source, "clients.count": clients, "data.alpha": alpha, "seed": seed}
    layers = [setting(f"{key}={json.dumps(value)}") for key, value in flags.items() if value is not None]
    config = resolve(*layers, *(setting(each) for each in set_ or []))
    from fedlora.data.load import load
    from fedlora.data.tasks import deal
    from fedlora.report.split import plot_split
    from fedlora.report.table import print_split

    dataset = load(config.data, config.seed)
    parts = deal(dataset, config.data, config.clients, config.seed)
    print_split(parts, dataset)
    plot_split(parts, dataset, picture)
    print(f"picture: {picture}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to make.")],
    client: Annotated[
        int | None, typer.Option("--client", metavar="ID", help="That client's own model, for personal methods.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model instead of an adapter.")] = False,
) -> None:
    """Write what a run has learned as a PEFT adapter, or as the whole model.

    Example: `fedlora export runs/first --to adapter`
    """
    from fedlora.engine.export import export as write

    kind = write(run, to, client, merged)
    print(f"{kind} in {to}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; standard input, one a line, when there is none.")
    ] = None,
) -> None:
    """Label new texts with a trained model: the label, its probability and the text, tab-separated.

    Example: `fedlora predict runs/first "my card has not arrived"`
    """
    wanted = texts or [line.rstrip("\n") for line in sys.stdin]
    if not wanted:
        raise BadInput("no text: give it as an argument or on standard input, one a line")
    from fedlora.engine.export import predict as label

    found = label(run, wanted, lambda text: print(f"note: {text}", file=sys.stderr))
    for text, (name, probability) in zip(wanted, found, strict=True):
        print(f"{name}\t{probability:.3f}\t{text}")


def _execute(config: Any, folder: Path, resume: bool, profile: bool, quiet: bool) -> None:
    from fedlora.compare.study import write_report
    from fedlora.engine.run import execute
    from fedlora.report.progress import Progress

    with Progress(quiet) as progress:
        try:
            summary = execute(config, folder, resume, progress, profile)
            progress.stage("drawing the report")
            write_report([folder], None)
        except KeyboardInterrupt:
            progress.close()
            again = f"; go on with: fedlora run --resume --out {folder}" if folder.exists() else ""
            _fail(f"stopped{again}", 130)
        except RunFailed as error:
            progress.close()
            _fail(f"{error}; what is complete is kept in {folder}", 1)
        except OSError as error:
            progress.close()
            kept = f"; what is complete is kept, go on with: fedlora run --resume --out {folder}" if folder.exists() else ""
            _fail(f"{error.filename or folder}: {error.strerror or error}{kept}", 1)
    final, totals = summary["final"], summary["totals"]
    score = "-" if final["accuracy"] is None else f"{100 * final['accuracy']:.1f} %"
    failed = f"failed replies {totals['failed']}  " if totals["failed"] else ""
    print(
        f"accuracy {score}  after {summary['rounds']} rounds  {failed}"
        f"up {totals['upload_bytes'] / 1e6:.1f} MB  down {totals['download_bytes'] / 1e6:.1f} MB  "
        f"result in {folder / summary['result']}"
    )


def _one_run(name: str, tables: dict[str, Any]) -> dict[str, Any]:
    from fedlora.compare.recipe import is_comparison

    if is_comparison(tables):
        raise BadInput(f"{name} is a recipe for several runs; start it with: fedlora compare {name}")
    return tables


def _is_toml(key: str, value: Any) -> bool:
    """A rank may be a number or a list, and the data a list; every other flag is a plain value."""
    return str(value)[:1] in {"clients.rank": "0123456789[", "data.source": "["}.get(key, ())


def _free_folder(name: str, config: Any) -> Path:
    stem = Path(name).stem if name.endswith(".toml") else name
    base = f"{stem}-seed{config.seed}" if config.seed else stem
    folder, number = Path("runs") / base, 2
    while folder.exists():
        folder, number = Path("runs") / f"{base}-{number}", number + 1
    return folder


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}" if status != 130 else message, file=sys.stderr)
    raise SystemExit(status)


def main() -> None:
    """The console script: bad input is one line and status 2."""
    try:
        app()
    except BadInput as error:
        _fail(str(error), 2)
