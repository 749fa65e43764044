"""fedlora from Python: what the command line does, with data, models and methods that are at hand, too.

run = fedlora.run(data=frame, method="lora-a2", rank=4, rounds=10)
run.rows, run.summary, run.predict(["a text"]), run.model(), run.save_adapter("adapter")
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import tasks
from fedlora.config import Config, merge, nested, read_recipe, resolve
from fedlora.data.given import RUN, Data, given, write
from fedlora.disk import require_place
from fedlora.errors import BadInput, brief, in_python
from fedlora.listener import Listener, Passing, Quiet
from fedlora.summary import in_words, read_metrics, read_rows
from fedlora.summary import read as read_summary
from fedlora.tasks.metrics import Metric

if TYPE_CHECKING:
    from fedlora.models.load import Given
    from fedlora.runs.predict import Predictor
    from fedlora.tasks.base import Answer

Row = dict[str, Any]
OnRound = Callable[[Row], object]
FLAGS = {  # arguments -> the keys that they set
    "task": "task.name",
    "rank": "clients.rank",
    "clients": "clients.count",
    "alpha": "data.alpha",
    "rounds": "train.rounds",
    "epochs": "train.epochs",
    "seed": "seed",
}


@contextmanager
def _as_in_python() -> Iterator[None]:
    """What goes wrong is said in the words of functions, not of the command line."""
    try:
        yield
    except BadInput as error:
        raise BadInput(in_python(str(error))).with_traceback(error.__traceback__) from error.__cause__


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

    @_as_in_python()
    def predict(self, inputs: Any, client: int | str | None = None, domain: str | None = None) -> "list[Answer]":
        """The answer to each input, with what else there is to say: {"label": ..., "probability": ..., "probabilities": {...}}.

        Args:
            inputs: a list of texts, or of images: paths, the bytes of files, PIL's, or arrays; or a table of any kind with the
                column of them that the run's data had. One alone is a list of one.
            client: where clients have models of their own: whose, by number or name.
            domain: in a run of several data sets, the one that the inputs are of.

        Raises:
            BadInput: there is no such model, or an input is none.
        """
        from fedlora.runs.inputs import listed

        model = self.predictor(client, domain)
        found = list(model.task.inputs(listed(inputs, model)))
        return model.answers(found) if found else []

    @_as_in_python()
    def predictor(self, client: int | str | None = None, domain: str | None = None) -> "Predictor":
        """The model of `predict`, loaded once for many calls of its `answers`."""
        from fedlora.runs.predict import choose, load

        return load(choose(self.folder, client, domain), given=self._given)

    @_as_in_python()
    def model(self, client: int | str | None = None) -> Any:
        """The model as PyTorch has it, for inference: a `peft.PeftModel`, or a whole one where no adapter can hold the result.
        BadInput: see `save_adapter`."""
        from fedlora.runs.export import model_of

        return model_of(self.folder, client, self._given)

    @_as_in_python()
    def save_adapter(self, to: str | Path, client: int | str | None = None, merged: bool = False) -> Path:
        """Write the result as a PEFT adapter with its tokenizer and a model card; returns its folder.

        Args:
            to: the folder to make.
            client: where clients have models of their own: whose, by number or name.
            merged: the whole model instead of an adapter.

        Raises:
            BadInput: the folder is there, there is no such client, or the result depends on the input, which no file can hold.
        """
        from fedlora.runs.export import export

        place = _path("to", to)
        with _writing("to", place):
            export(self.folder, place, client, merged, self._given)
        return place

    def report(self, html: str | Path | None = None) -> Path:
        """Write the page about the run, report.html in its folder or `html`; returns where it is. BadInput: it cannot be there."""
        return _report(self.folder, html)

    def __str__(self) -> str:
        done, rows = self.summary, self.rows
        if done is not None:
            return f"{in_words(done, self.metrics)}  after {done['rounds']} rounds"
        return f"{len(rows)} of {self.config.train.rounds} rounds in {self.folder}"

    def _repr_html_(self) -> str:
        from fedlora.report.notebook import summary

        return summary([self.folder]) if self.rows else f"<p>{self}</p>"


@_as_in_python()
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
            client. A list of names is a run of several data sets.
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
    own, tables = _model(model, tokenizer), given(data) if data is not None else None
    folder, place = _folder(out)
    named = own and _name_of(own, folder if resume else None)
    flags = {"task": task, "rank": rank, "clients": clients, "alpha": alpha, "rounds": rounds, "epochs": epochs, "seed": seed}
    layers = [*_layers(flags, named or model, tables, settings), *([] if method is None else [{"method": as_table(method)}])]
    config = configure(recipe, layers, folder if resume else None)
    notes: list[str] = []
    with _shown(progress) as shown:
        play(config, folder, resume, _Told(shown, notes, on_round), tables if isinstance(tables, Data) else None, own)
    return Run(folder, tuple(notes), own, place)


@_as_in_python()
def load(folder: str | Path, model: Any = None, tokenizer: Any = None) -> Run:
    """A run in its folder. BadInput when it is none.

    Args:
        model, tokenizer: those that the run was given itself, if it was.
    """
    own = _model(model, tokenizer)
    found = Run(_path("folder", folder), (), own)
    source = found.config.model.source
    named = str(model) if own is None else _name_of(own, found.folder)
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


@_as_in_python()
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
    own, tables = _model(model, tokenizer), given(data) if data is not None else None
    flags = {"task": task, "rank": rank, "clients": clients, "alpha": alpha, "rounds": rounds, "epochs": epochs, "seed": seed}
    folder, place = _folder(out)
    header = Header(title=title or "A comparison of methods", name="methods")
    layers = [*_layers(flags, own.source if own else model, tables, settings), {"method": [as_table(each) for each in methods]}]
    claim(Recipe(header, {}), folder)  # before anything is written there
    with _writing("out", folder):
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
        found.append(_one_run("recipe" if isinstance(recipe, Mapping) else str(recipe), tables))
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
) -> dict[str, Any]:
    """Run, or go on with, the run in `out`; returns its summary. See `fedlora.runs.play.execute`.

    Args:
        data: what the run keeps, where the configuration cannot name it.
        own: the model, where it is at hand.
    """
    from fedlora.runs.play import execute

    def keep(folder: Path) -> None:
        if data is not None:
            write(data, folder / data.name, config.task.name, config.data.model_dump(mode="json"))

    return execute(config, out, resume, listener, profile, keep=keep, given=own)


def as_table(method: Any) -> dict[str, Any]:
    """The table `[method]` of a method: a name, the table, or the method itself. BadInput when it is nothing of all this."""
    if isinstance(method, str | Mapping):
        return {"name": method} if isinstance(method, str) else dict(method)
    kind = method if isinstance(method, type) else type(method)
    if not (is_dataclass(kind) and hasattr(kind, "FACTS")):
        raise BadInput(f"method: {kind.__name__} is no method; possible: a name, or a dataclass as fedlora.types.Method says")
    if "<locals>" in kind.__qualname__:
        raise BadInput(f"method: {kind.__name__} is defined inside a function, where a run that is resumed cannot find it")
    package, _, module = kind.__module__.rpartition(".")
    name = module.replace("_", "-") if package == "fedlora.methods" else f"{kind.__module__}:{kind.__qualname__}"
    values = {} if isinstance(method, type) else {each.name: _plain(getattr(method, each.name)) for each in fields(method)}
    return {"name": name, **{key: value for key, value in values.items() if value is not None}}


def _plain(value: Any) -> Any:
    """A value as TOML has it."""
    if isinstance(value, Enum):
        return value.value
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _layers(
    flags: Mapping[str, Any],
    model: Any,
    data: str | list[str] | Data | None,
    settings: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """The tables that arguments set, `settings` over them."""
    if settings is not None and not (isinstance(settings, Mapping) and all(isinstance(key, str) for key in settings)):
        raise BadInput(f"settings: {brief(settings)} is no mapping of keys, as in {{'train.lr': 1e-3}}")
    keys: dict[str, Any] = {FLAGS[name]: value for name, value in flags.items()}
    keys["model.source"] = None if model is None else str(model)
    if isinstance(data, Data):
        keys["data.source"] = f"{RUN}{data.name}"
        keys |= {"data.column": data.column, "data.partition": "column"} if data.column is not None else {}
    else:
        keys["data.source"] = data
    return [nested(key, _plain(value)) for key, value in (*keys.items(), *(settings or {}).items()) if value is not None]


def _name_of(own: "Given", run: Path | None) -> str:
    """What a configuration calls a model that is at hand; that of a run, as the version did that began it."""
    recorded = read_recipe(str(run / "config.toml")).get("model", {}) if run and (run / "config.toml").exists() else {}
    return own.earlier if recorded.get("source") == own.earlier else own.source


def _report(folder: Path, html: str | Path | None) -> Path:
    from fedlora.comparison.run import write_report

    place = None if html is None else _path("html", html)
    if place is not None:
        require_place("html", place, (".html", ".htm"))
    with _writing("html", place or folder):
        return write_report([folder], place)


def _path(name: str, value: Any) -> Path:
    """The path that an argument is. BadInput where it is none."""
    if not isinstance(value, str | PathLike):
        raise BadInput(f"{name}: {brief(value)} is no path")
    return Path(value).expanduser()


@contextmanager
def _writing(name: str, place: Path) -> Iterator[None]:
    """BadInput where nothing can be written in a place that an argument names."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{name} {place}: cannot be written: {error.strerror or error}") from error


class _Temporary:
    """A folder that is gone when nothing holds this any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fedlora-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _folder(out: str | Path | None) -> tuple[Path, _Temporary | None]:
    """Where to write, and what keeps it: a temporary folder where none is named."""
    if out is not None:
        return _path("out", out), None
    place = _Temporary()
    return place.path / "run", place


def _one_run(name: str, tables: Mapping[str, Any]) -> Mapping[str, Any]:
    from fedlora.comparison.recipe import is_comparison

    if is_comparison(tables):
        raise BadInput(f"{name} is a recipe for several runs; start it with: fedlora compare {name}")
    return tables


def _model(model: Any, processor: Any) -> "Given | None":
    """A model that is given itself; None where it is named, or not said."""
    if model is None or isinstance(model, str | Path):
        if processor is not None:
            raise BadInput("tokenizer: it goes with a model that is given itself; a named model has its own")
        return None
    from transformers import PreTrainedModel
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from fedlora.models.load import Given, processor_of

    kind = type(model).__name__
    if hasattr(model, "peft_config"):
        raise BadInput(f"model: {kind} holds an adapter already; merge it first (merge_and_unload), or give its base")
    if not isinstance(model, PreTrainedModel):
        raise BadInput(f"model: {kind} is no model of transformers; possible: a PreTrainedModel, or a model's name or folder")
    if getattr(model, "is_quantized", False):
        raise BadInput(f"model: {kind} is quantised, and its weights cannot be read back; give it as it was before")
    if any(x.is_meta for x in model.state_dict().values()):
        raise BadInput(f"model: {kind} has no weights: it is on torch's device 'meta'")
    if processor is not None and not isinstance(processor, PreTrainedTokenizerBase | ImageProcessingMixin):
        raise BadInput(
            f"tokenizer: {type(processor).__name__} is none of transformers', nor an image processor; give the object itself"
        )
    return Given(model, processor if processor is not None else processor_of(model))


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
