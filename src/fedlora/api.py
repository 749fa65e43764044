"""fedlora from Python: what the command line does, with data, models and methods that are at hand, too.

run = fedlora.run(data=frame, method="lora-a2", rank=4, rounds=10)
run.rows, run.summary, run.predict(["a text"]), run.model(), run.save_adapter("adapter")
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import tasks
from fedlora.arguments import as_in_python, as_table, joining, layers_of, model_of, name_of, one_run, path_of, place_of, writing
from fedlora.config import Config, read_recipe, resolve
from fedlora.data.given import Data, given, write
from fedlora.disk import require_place
from fedlora.errors import BadInput
from fedlora.listener import Listener, Passing, Quiet
from fedlora.names import counted
from fedlora.summary import in_words, read_metrics, read_rows
from fedlora.summary import read as read_summary
from fedlora.tables import merge
from fedlora.tasks.metrics import Metric

if TYPE_CHECKING:
    from fedlora.models.load import Given
    from fedlora.runs.predict import Predictor
    from fedlora.runs.trainers import TrainerClient
    from fedlora.tasks.base import Answer

Row = dict[str, Any]
OnRound = Callable[[Row], object]


@dataclass(frozen=True)
class Run:
    """A run in its folder, finished or not.

    Attributes:
        folder: of the run.
        notes: what was said while it was prepared and played.
    """

    folder: Path
    notes: tuple[str, ...] = ()
    _given: "Given | None" = field(default=None, repr=False)
    _place: Any = field(default=None, repr=False, compare=False)  # keeps a temporary folder as long as the run
    _clients: "tuple[TrainerClient, ...]" = field(default=(), repr=False, compare=False)

    @property
    def config(self) -> Config:
        """The whole configuration."""
        from fedlora.config import read_run

        return read_run(self.folder)

    @property
    def rows(self) -> list[Row]:
        """What was measured, a row a round: see "Run folder" in the README."""
        return read_rows(self.folder)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What the run is scored by; the first is the one that runs are compared by."""
        return read_metrics(self.folder)

    @property
    def summary(self) -> Any:
        """The scores of the result and the totals, as a dictionary; None while the run is not finished."""
        return read_summary(self.folder)

    @as_in_python()
    def predict(
        self,
        inputs: Any,
        client: int | str | None = None,
        domain: str | None = None,
        base: bool = False,
        max_new_tokens: int | None = None,
    ) -> "list[Answer]":
        """The answer to each input, with what else there is to say: {"label": ..., "probability": ..., "probabilities": {...}}, or
        of a language model {"answer": ..., "tokens": ...}.

        Args:
            inputs: a list of texts, or of images: paths, the bytes of files, PIL's, or arrays; of a language model also lists of
                messages; or a table of any kind with the column of them that the run's data had. One alone is a list of one.
            client: where clients have models of their own: whose, by number or name.
            domain: in a run of several data sets, the one that the inputs are of.
            base: of a language model: what it says as it was pre-trained, without what was learned.
            max_new_tokens: of a language model's answer; those of the run where it is left out.

        Raises:
            BadInput: there is no such model, or an input is none.
        """
        from fedlora.runs.inputs import listed

        model = self.predictor(client, domain, base, max_new_tokens)
        found = list(model.task.inputs(listed(inputs, model)))
        return model.answers(found) if found else []

    @as_in_python()
    def predictor(
        self, client: int | str | None = None, domain: str | None = None, base: bool = False, max_new_tokens: int | None = None
    ) -> "Predictor":
        """The model of `predict`, loaded once for many calls of its `answers`."""
        from fedlora.runs.predict import choose, load, writing
        from fedlora.runs.prepare import make_task

        choice = choose(self.folder, client, domain)
        if base:
            writing(make_task(choice.config), "base")
        model = load(choice, given=self._given, max_new_tokens=max_new_tokens)
        return model.base if base else model

    @as_in_python()
    def model(self, client: int | str | None = None) -> Any:
        """The model as PyTorch has it, for inference: a `peft.PeftModel`, or a whole one where no adapter can hold the result.
        Where clients have trainers of their own, it is the model of the first one's, or of the client's, which then is this.
        BadInput: see `save_adapter`."""
        from fedlora.runs.export import model_of

        if self.config.train.trainer is not None:
            from fedlora.runs.trainers import show

            return show(self.folder, self._clients, client).hf.adapter.model.eval()
        return model_of(self.folder, client, self._given)

    @as_in_python()
    def save_adapter(self, to: str | Path, client: int | str | None = None, merged: bool = False, rank: int | None = None) -> Path:
        """Write the result as a PEFT adapter with its tokenizer and a model card; returns its folder.

        Args:
            to: the folder to make.
            client: where clients have models of their own: whose, by number or name.
            merged: the whole model instead of an adapter.
            rank: to which the adapter is cut, by the SVD of each module; what that takes away is printed, and in fedlora.json.

        Raises:
            BadInput: the folder is there, there is no such client, the result depends on the input, which no file can hold, or
                there is no adapter to cut.
        """
        from fedlora.runs.export import export

        place = path_of("to", to)
        with writing("to", place):
            export(self.folder, place, client, merged, self._given, self._clients, rank)
        return place

    def report(self, html: str | Path | None = None) -> Path:
        """Write the page about the run, report.html in its folder or `html`; returns where it is. BadInput: it cannot be there."""
        return _report(self.folder, html)

    def __str__(self) -> str:
        done, rows = self.summary, self.rows
        if done is not None:
            return f"{in_words(done, self.metrics)}  after {counted(done['rounds'], 'round')}"
        return f"{len(rows)} of {self.config.train.rounds} rounds in {self.folder}"

    def _repr_html_(self) -> str:
        from fedlora.report.notebook import summary

        return summary([self.folder]) if self.rows else f"<p>{self}</p>"


@as_in_python()
def run(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    method: Any = None,
    data: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    task: str | None = None,
    rank: int | Sequence[int] | str | None = None,
    clients: int | None = None,
    alpha: float | None = None,
    rounds: int | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    on_round: OnRound | None = None,
    progress: bool = True,
) -> Run:
    """Fine-tune a model over clients that share only small updates.

    Args:
        recipe: a TOML file, a packaged recipe's name, or its tables.
        method: by name, as `fedlora methods` lists them; or a method itself, a dataclass as `fedlora.types.Method` says.
        data: the name of a data set, a file or a folder; a data frame or another table; `Data`; a list of such tables, one for each
            client. A list of names is a run of several data sets. A list of `fedlora.client(...)`: clients with their own trainers.
        model: by name or folder; or transformers' own, which is read and never changed.
        tokenizer: of a model that is given itself; by default the one that the model's own name or folder has.
        task: by name.
        rank, clients, alpha, rounds, epochs, seed: of the most used keys, as on the command line.
        settings: any other keys: {"train.lr": 1e-3}, or tables.
        out: the run's folder; without it the run lives as long as the object that is returned.
        resume: go on with the run in `out`.
        on_round: hears each row; the run ends after a round for which it returns True, with that round's model as the result, and
            can be resumed.
        progress: whether to show what goes on.

    Raises:
        BadInput: something cannot be, in one line: what, where, what is possible. Nothing was written.
        RunFailed: the run stopped, and can be resumed.
    """
    if on_round is not None and not callable(on_round):
        raise BadInput(f"on_round: {type(on_round).__name__} is no function of a row")
    if resume and out is None:
        raise BadInput("resume: it needs out, the folder of the run to go on with")
    bring = joining(data)  # clients with trainers of their own
    own, tables = model_of(model, tokenizer), None if data is None or bring else given(data)
    if bring:
        settings = {**(settings or {}), "train.trainer": f"given:{type(bring[0].hf.trainer).__name__}"}
    folder, place = place_of(out)
    named = own and name_of(own, folder if resume else None)
    flags = {"task": task, "rank": rank, "clients": clients, "alpha": alpha, "rounds": rounds, "epochs": epochs, "seed": seed}
    layers = [*layers_of(flags, named or model, tables, settings), *([] if method is None else [{"method": as_table(method)}])]
    config = configure(recipe, layers, folder if resume else None)
    notes: list[str] = []
    with _shown(progress) as shown:
        play(
            config,
            folder,
            resume,
            _Told(shown, notes, on_round),
            tables if isinstance(tables, Data) else None,
            own,
            clients=bring,
        )
    return Run(folder, tuple(notes), own, place, bring)


def client(trainer: Any, name: str | None = None) -> "TrainerClient":
    """A client that trains by a `transformers.Trainer` of its own, or a subclass of it such as trl's SFTTrainer:
    `fedlora.run(data=[fedlora.client(one), fedlora.client(other)], method="fedit", rounds=10)`.

    Args:
        trainer: its model is a PEFT model with one LoRA adapter. A round is one `train()` of it; its data stay with it.
        name: in tables; by default client-0, client-1 and so on, in order of the list.

    Raises:
        BadInput: it cannot be a client, in one line.
    """
    from fedlora.runs.trainers import as_client

    return as_client(trainer, name or "")


@as_in_python()
def load(folder: str | Path, model: Any = None, tokenizer: Any = None) -> Run:
    """A run in its folder. BadInput when it is none.

    Args:
        model, tokenizer: those that the run was given itself, if it was.
    """
    own = model_of(model, tokenizer)
    found = Run(path_of("folder", folder), (), own)
    source = found.config.model.source
    named = str(model) if own is None else name_of(own, found.folder)
    if model is not None and named != source:
        hint = "; a model that was given itself is given so here, too" if own is None else ""
        raise BadInput(f"model: the run in {folder} was made with {source}, and this is {named}{hint}")
    return found


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison in its folder.

    Attributes:
        folder: of the comparison.
        failed: how many of its runs failed.
        notes: what was said while it was prepared and played.
    """

    folder: Path
    failed: int
    notes: tuple[str, ...] = ()
    _place: Any = field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> list[Row]:
        """A row a run: what was varied, the scores, the bytes."""
        from pyarrow import parquet

        rows: list[Row] = parquet.read_table(self.folder / "results.parquet").to_pylist()
        return rows

    def report(self, html: str | Path | None = None) -> Path:
        """Write the page about the comparison; returns where it is. BadInput: it cannot be there."""
        return _report(self.folder, html)

    def __str__(self) -> str:
        return (self.folder / "results.md").read_text()

    def _repr_html_(self) -> str:
        from fedlora.report.notebook import summary

        return summary([self.folder / "cells" / row["hash"] for row in self.rows if row["status"] == "done"])


@as_in_python()
def compare_methods(
    methods: Sequence[Any],
    *,
    data: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    task: str | Sequence[str] | None = None,
    rank: int | str | Sequence[int | str | Sequence[int]] | None = None,
    clients: int | Sequence[int] | None = None,
    alpha: float | Sequence[float] | None = None,
    rounds: int | Sequence[int] | None = None,
    epochs: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    title: str = "",
    progress: bool = True,
) -> Comparison:
    """Run several methods on equal terms, each in a process of its own, and set them side by side.

    Args:
        methods: names, methods themselves, or tables of a name and fields.
        task, rank, clients, alpha, rounds, epochs, seed and the keys of `settings`: a list runs each of its values (a list of ranks
            by client is a list in it).
        out: the folder; continued where it is there.
        jobs: how many run at a time.
        title: of the report.

    The others are those of `run`. Raises BadInput.
    """
    from fedlora.comparison.at_hand import keep
    from fedlora.comparison.folder import claim
    from fedlora.comparison.recipe import Header, Recipe
    from fedlora.comparison.run import play_recipe

    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise BadInput("methods: a list is needed, as in ['fedit', 'ffa-lora']")
    if not methods:
        raise BadInput("methods: at least one is needed")
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise BadInput(f"jobs = {jobs!r}: a number of runs at a time, at least 1")
    own, tables = model_of(model, tokenizer), given(data) if data is not None else None
    flags = {"task": task, "rank": rank, "clients": clients, "alpha": alpha, "rounds": rounds, "epochs": epochs, "seed": seed}
    folder, place = place_of(out)
    header = Header(title=title or "A comparison of methods", name="methods")
    layers = [*layers_of(flags, own.source if own else model, tables, settings), {"method": [as_table(each) for each in methods]}]
    claim(Recipe(header, {}), folder)  # before anything is written there
    with writing("out", folder):
        whole = merge(*layers, *keep(folder, own, tables, merge(*layers)))
    notes: list[str] = []
    failed, _ = play_recipe(Recipe(header, whole), folder, jobs, not progress, None if progress else notes.append)
    return Comparison(folder, failed, tuple(notes), place)


def configure(
    recipe: str | Path | Mapping[str, Any] | None, layers: Iterable[Mapping[str, Any]], resumed: Path | None = None
) -> Config:
    """The configuration of a recipe with `layers` over it; of a run that is resumed, over what its folder has.

    Raises:
        BadInput: a key or a value is wrong, the recipe is one for several runs, or there is nothing to resume.
    """
    found: list[Mapping[str, Any]] = []
    if recipe is not None:
        tables = recipe if isinstance(recipe, Mapping) else read_recipe(str(recipe))
        found.append(one_run("recipe" if isinstance(recipe, Mapping) else str(recipe), tables))
    if resumed is not None:
        if recipe is None and not resumed.exists():
            raise BadInput(
                f"--resume: there is no run in {resumed} to go on with; to start one, name a recipe or leave --resume out"
            )
        if (resumed / "config.toml").exists():
            found.insert(0, read_recipe(str(resumed / "config.toml")))
    layers = list(layers)
    return resolve(tasks.defaults(*found, *layers), *found, *layers)


def play(
    config: Config,
    out: Path,
    resume: bool,
    listener: Listener,
    data: Data | None = None,
    own: "Given | None" = None,
    profile: bool = False,
    clients: "Sequence[TrainerClient]" = (),
) -> dict[str, Any]:
    """Run, or go on with, the run in `out`; returns its summary. See `fedlora.runs.play.execute`.

    Args:
        data: what the run keeps, where the configuration cannot name it.
        own: the model, where it is at hand.
        clients: those with trainers of their own.
    """
    from fedlora.runs.play import execute

    def keep(folder: Path) -> None:
        if data is not None:
            label = config.data.label
            used = tasks.columns(config.task.name, config.data.model_dump(mode="json"))
            write(data, folder / data.name, label if isinstance(label, str) else label[0], used)

    return execute(config, out, resume, listener, profile, keep=keep, given=own, clients=clients)


def _report(folder: Path, html: str | Path | None) -> Path:
    from fedlora.comparison.run import write_report

    place = None if html is None else path_of("html", html)
    if place is not None:
        require_place("html", place, (".html", ".htm"))
    with writing("html", place or folder):
        return write_report([folder], place)


@contextmanager
def _shown(progress: bool) -> Iterator[Listener]:
    """Who shows what goes on."""
    from fedlora.report.progress import Progress

    if not progress:
        yield Quiet()
        return
    with Progress(quiet=False) as shown:
        yield shown


class _Told(Passing):
    """A listener that keeps the notes and tells a function of each round."""

    def __init__(self, listener: Listener, notes: list[str], on_round: OnRound | None) -> None:
        super().__init__(listener)
        self.notes, self.on_round = notes, on_round

    def note(self, text: str) -> None:
        self.notes.append(text)
        super().note(text)

    def round(self, row: Row) -> bool | None:
        stop, said = super().round(row), self.on_round and self.on_round(dict(row))
        return stop or said is True or (hasattr(said, "item") and said.item() is True)  # numpy and torch have their own True
