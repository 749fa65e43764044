"""The command line. Everything heavy is imported inside the commands, so that `fedlora --help` is quick."""

import errno
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fedlora import __version__
from fedlora.cli_federate import app as federate
from fedlora.disk import require_place
from fedlora.errors import BadInput, NoModel, RunFailed, unknown
from fedlora.signals import exit_status, terminable

app = typer.Typer(
    name="fedlora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(federate)

Setting = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key, as in train.batch_size=16.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="S")]
Task = Annotated[
    str | None, typer.Option("--task", metavar="T", help="What the model is for: text_classification, or another file of tasks/.")
]
Clients = Annotated[int | None, typer.Option("--clients", metavar="K", help="Number of clients.")]
Client = Annotated[
    str | None,
    typer.Option("--client", metavar="ID", help="Where clients have models of their own: that one's, by number or name."),
]
Alpha = Annotated[float | None, typer.Option("--alpha", metavar="A", help="Dirichlet's alpha: smaller is more heterogeneous.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fedlora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Federated LoRA fine-tuning: every published method behind one contract."""


def _print_keys(wanted: bool) -> None:
    if wanted:
        from fedlora.reference import reference

        print(reference(), end="")
        raise typer.Exit


@app.command(no_args_is_help=True)
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A TOML file, or a packaged recipe: demo.")] = None,
    task: Task = None,
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="See `fedlora methods`.")] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", metavar="N", help="A number, a list by client, or a plan: tiers, heavy-tail, normal.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="minilm, smollm2, a local folder, a GGUF file, or a Hub id.")
    ] = None,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how large the run would be and how long it would take; write nothing.")
    ] = False,
    help_keys: Annotated[
        bool, typer.Option("--help-keys", callback=_print_keys, is_eager=True, help="Print what --set can set, and leave.")
    ] = False,
) -> None:
    """Fine-tune a model over clients that share only small updates.

    Examples: `fedlora run demo` (packaged model and data, no network) and

    `fedlora run --data tickets.csv --method lora-a2 --rank 1 --alpha 0.01 --clients 30 --out runs/first`
    """
    from fedlora.api import configure
    from fedlora.tables import setting, settings

    flags = {
        "task.name": task,
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
    if out is not None:
        require_place("--out", out)
    if resume and out is None:
        raise BadInput("--resume needs --out, the folder of the run to go on with")
    layers = [
        setting(f"{key}={json.dumps(value) if not _is_toml(key, value) else value}")
        for key, value in flags.items()
        if value is not None
    ]
    layers.append(settings(set_ or []))
    config = configure(recipe, layers, out if resume else None)
    if dry_run:
        _rehearse(config, quiet)
        return
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
    from fedlora.comparison.recipe import Scale
    from fedlora.comparison.run import compare as start
    from fedlora.comparison.run import listing
    from fedlora.tables import settings

    if list_:
        print(listing())
        return
    if recipe is None:
        raise BadInput("no recipe: name a TOML file or a packaged recipe; `fedlora compare --list` shows these")
    if out is not None:
        require_place("--out", out)
    scales = {each.value: each for each in Scale}
    if scale is not None and scale not in scales:
        raise unknown("--scale", scale, scales)
    again = f"; go on with: {shlex.join(['fedlora', *sys.argv[1:]])}"
    try:
        with terminable():
            failed = start(recipe, scales.get(scale or ""), out, jobs, [settings(set_ or [])], quiet)
    except KeyboardInterrupt as stop:
        _fail(f"stopped; what is complete is kept{again}", exit_status(stop))
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
    if html is not None:
        require_place("--html", html, (".html", ".htm"))
    from fedlora.comparison.run import write_report

    print(f"report: {write_report(runs, html)}")


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False) -> None:
    """List every method: paper, exact or not, mixed ranks, personal models, what crosses the wire.

    Example: `fedlora methods --json`
    """
    from fedlora.report import methods as listing

    if as_json:
        print(listing.as_json())
    else:
        listing.print_methods()


@app.command()
def data(
    source: Annotated[str, typer.Argument(metavar="NAME_OR_PATH", help="A catalogue name, a file, a folder, or a Hub id.")],
    task: Task = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="Of a language model: whose tokens are counted and shown.")
    ] = None,
    clients: Clients = None,
    alpha: Alpha = None,
    seed: Seed = None,
    picture: Annotated[Path, typer.Option("--picture", metavar="FILE", help="Where to write the picture.")] = Path("split.png"),
    set_: Setting = None,
) -> None:
    """Show how a data set is dealt to clients, before any training: a table, the statistics of the split, and a picture. For a
    language model, also an example as the model sees it, what of it is learned, and how long examples are.

    Example: `fedlora data banking77 --clients 30 --alpha 0.01`
    """
    require_place("--picture", picture, (".png",))
    from fedlora.config import Strata, resolve
    from fedlora.tables import setting, settings
    from fedlora.tasks import defaults

    flags = {
        "task.name": task,
        "model.source": model,
        "data.source": source,
        "clients.count": clients,
        "data.alpha": alpha,
        "seed": seed,
    }
    layers = [setting(f"{key}={json.dumps(value)}") for key, value in flags.items() if value is not None]
    layers.append(settings(set_ or []))
    config = resolve(defaults(*layers), *layers)
    from fedlora.data.domains import deal
    from fedlora.data.load import load
    from fedlora.report.split import plot_split
    from fedlora.report.table import print_split, print_tokens
    from fedlora.tasks import make

    if config.data.strata is Strata.CLUSTER:
        raise BadInput('data.strata = "cluster": clusters are of what the model makes of the data; only a run finds them')
    kind = make(config.task.name, config.task.settings)
    dataset, survey, unseen = load(kind, config.data, config.seed), None, ""
    from rich.console import Console

    try:
        with Console(stderr=True).status("counting tokens ..."):  # seen on a terminal only
            survey = kind.survey(dataset, config.model, config.data.max_length)
    except NoModel as error:
        if model is not None:
            raise
        unseen = f"what of them is learned is seen with --model: {error}"
    if model is not None and survey is None:
        raise BadInput(f"--model: of {kind.TITLE} nothing is shown that depends on the model; leave it out")
    dataset = dataset if survey is None else survey.dataset
    parts = deal(dataset, config.data, config.clients, config.seed)
    print_split(parts, dataset, None if survey is None else survey.trained)
    if survey is not None:
        print_tokens(survey.shown, survey.tokens, survey.trained, survey.limit, survey.notes)
    if unseen:
        print(f"note: {unseen}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_split(parts, dataset, picture)
    print(f"picture: {picture}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to make.")],
    client: Client = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model instead of an adapter.")] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="Cut the adapter to this rank, and say what that takes away.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload the folder to this repository of the Hugging Face Hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that --push makes is for everybody to see.")] = False,
) -> None:
    """Write what a run has learned as a PEFT adapter, or as the whole model.

    A repository is made where there is none, private unless --public is given; the token is that of HF_TOKEN or `hf auth login`.

    Example: `fedlora export runs/first --to adapter`
    """
    require_place("--to", to)
    if public and push is None:
        raise BadInput("--public is for --push, which is missing")
    from fedlora.runs import hub

    if push is not None:
        hub.check(push)
    from fedlora.runs.export import export as write

    kind = write(run, to, client, merged, rank=rank)
    print(f"{kind} in {to}")
    if push is not None:
        base = hub.private_base(to)
        if base is not None:
            print(f"note: others need the adapter's base, which is {base} here; --merged pushes the whole model", file=sys.stderr)
        try:
            print(f"pushed to {hub.push(to, push, public)}")
        except RunFailed as error:
            _fail(str(error), 1)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; standard input, one a line, when there is none.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help="A .txt with a text a line, or a file like the run's data: its texts, or its prompts."
        ),
    ] = None,
    client: Client = None,
    domain: Annotated[
        str | None, typer.Option("--domain", metavar="NAME", help="In a run of several data sets: the one that the texts are of.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="tsv|csv|json",
            help="tsv when left out; csv and json (an object a line) have every class's probability, and a prompt's known answer.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", min=1, help="Answer N texts at a time, as they come; all at once when left out."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Of a language model's answer; the run's own.")
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="What a language model says before and after it was tuned, side by side.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with a language model, line by line.")] = False,
) -> None:
    """Answer new texts with the model that the run scored: the label, its probability and the text, tab-separated.

    Tabs, line ends and backslashes in a text are escaped with a backslash in tsv. A blank line is a text, too. A language model
    answers prompts: its answer, how many tokens it has, and the prompt. On a terminal the answer to a single prompt is shown as it
    is written.

    Example: `fedlora predict runs/first "my card has not arrived"`
    """
    if texts and input is not None:
        raise BadInput("texts as arguments and --input: give one of them")
    alone = {"texts as arguments": texts, "--input": input, "--format": form, "--batch": batch}
    if chat and (too := next((name for name, value in alone.items() if value), None)):
        raise BadInput(f"--chat reads lines as they are typed; leave {too} out")
    from rich.console import Console

    errors = Console(stderr=True, highlight=False)

    def note(text: str) -> None:
        errors.print(f"note: {text}", markup=False, soft_wrap=True)

    with errors.status("starting ..."):  # seen on a terminal only
        from fedlora.runs.predict import Format, choose, load, writing, written
        from fedlora.runs.prepare import make_task

        forms = {each.value: each for each in Format}
        if form is not None and form not in forms:
            raise unknown("--format", form, forms)
        choice = choose(run, client, domain)
        kind = make_task(choice.config)
        asked = {"--chat": chat, "--compare-base": compare_base, "--max-new-tokens": max_new_tokens}
        for option in (name for name, value in asked.items() if value):
            writing(kind, option)

    def loaded() -> Any:
        with errors.status("loading ...") as waiting:
            return load(choice, note, lambda text: waiting.update(f"{text} ..."), max_new_tokens=max_new_tokens)

    def say(text: str) -> None:
        print(text, end="", flush=True)

    if chat:
        _chat(loaded(), compare_base, say, note)
        return
    if texts:
        wanted = kind.inputs(texts)
    elif input is not None:
        wanted = kind.read_inputs(input, choice.source)
    else:
        if sys.stdin.isatty():
            note(f"reading {kind.INPUT}s from here, one a line; Ctrl-D ends them")
        wanted = kind.read_lines(sys.stdin.buffer, "standard input")
    batches = _batches(wanted, batch)
    first = next(batches)  # before the model is loaded, for it may be that there is none
    model = loaded()
    if kind.WRITES and len(texts or ()) == 1 and form is None and sys.stdout.isatty():
        for name, each in _asked(model, compare_base).items():
            say(f"{name}: " if name else "")
            each.write(first[0], say)
            say("\n")
        return
    for piece in written(model, chain([first], batches), forms[form or "tsv"], compare_base):
        say(piece)


def _chat(model: Any, compare_base: bool, say: Callable[[str], None], note: Callable[[str], None]) -> None:
    """A conversation with a model, on a terminal or with lines that are piped."""
    from contextlib import suppress

    from fedlora.chat import converse

    with suppress(ImportError):
        import readline  # noqa: F401  # what it gives `input`: editing a line, and earlier ones
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # what is no UTF-8
    prompt = "> " if sys.stdin.isatty() else ""
    converse(_asked(model, compare_base), lambda: input(prompt), say, note)


def _asked(model: Any, compare_base: bool) -> dict[str, Any]:
    """Who answers, by name."""
    return {"base": model.base, "tuned": model} if compare_base else {"": model}


def _batches(texts: Iterator[Any], size: int | None) -> Iterator[list[Any]]:
    """All texts, or `size` of them at a time. BadInput where there is none."""
    batch = list(islice(texts, size))
    if not batch:
        raise BadInput("no text: give it as an argument, with --input, or on standard input, one a line")
    while batch:
        yield batch
        batch = list(islice(texts, size))


def _rehearse(config: Any, quiet: bool) -> None:
    from fedlora.report.progress import Progress
    from fedlora.runs.dry import rehearse

    with Progress(quiet) as progress:
        plan = rehearse(config, progress)
    print(plan)


def _execute(config: Any, folder: Path, resume: bool, profile: bool, quiet: bool) -> None:
    from fedlora.api import play
    from fedlora.comparison.run import write_report
    from fedlora.report.progress import Progress

    with terminable(), Progress(quiet) as progress:
        try:
            summary = play(config, folder, resume, progress, profile=profile)
            progress.stage("drawing the report")
            write_report([folder], None)
        except KeyboardInterrupt as stop:
            progress.close()
            again = f"; go on with: fedlora run --resume --out {folder}" if folder.exists() else ""
            _fail(f"stopped{again}", exit_status(stop))
        except RunFailed as error:
            progress.close()
            _fail(f"{error}; what is complete is kept in {folder}", 1)
        except OSError as error:
            progress.close()
            kept = f"; what is complete is kept, go on with: fedlora run --resume --out {folder}" if folder.exists() else ""
            _fail(f"{error.filename or folder}: {error.strerror or error}{kept}", 1)
    from fedlora.summary import advice, last_line, read_metrics, read_rows

    metrics = read_metrics(folder)
    for text in () if quiet else advice(read_rows(folder), summary, metrics[0]):
        progress.note(text)
    print(f"{last_line(summary, metrics)}  {_where(folder, summary)}")


def _where(folder: Path, summary: Mapping[str, Any]) -> str:
    """Where the model is that was scored, or how to get at it."""
    if "clients" in summary:
        return f"each client's model by: fedlora export {folder} --client NAME --to FOLDER"
    if summary["result"] == "checkpoint":
        return f"no adapter can hold the result; it answers by: fedlora predict {folder}"
    return f"result in {folder / summary['result']}"


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
    print(message if status > 128 else f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


UsageError: Any = typer.BadParameter.__base__  # of click, which newer versions of typer carry inside


def main() -> None:
    """The console script: bad input is one line and status 2."""
    try:
        raise SystemExit(app(standalone_mode=False, prog_name="fedlora") or 0)
    except BadInput as error:
        _fail(" ".join(str(error).splitlines()), 2)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(end=error.format_message())  # the help; with rich it is printed already
            raise SystemExit(2) from None
        _fail(f"{error.format_message().rstrip('.')}; see {error.ctx.command_path if error.ctx else 'fedlora'} --help", 2)
    except RunFailed as error:
        _fail(str(error), 1)
    except typer.Abort:
        _fail("stopped", 130)
    except OSError as error:
        _fail(
            f"{error.filename}: {error.strerror}" if error.filename else str(error), 2 if error.errno == errno.ENAMETOOLONG else 1
        )
