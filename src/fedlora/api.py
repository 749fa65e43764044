"""fedlora from Python: what the command line does, with data, models and methods that are at hand, too.

run = fedlora.run(data=frame, method="lora-a2", rank=4, rounds=10)
run.rows, run.summary, run.predict(["a text"]), run.model(), run.save_adapter("adapter")
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import tasks
from fedlora.config import Config, read_recipe, resolve
from fedlora.data.given import RUN, Data, given, write
from fedlora.errors import BadInput
from fedlora.listener import Listener, Passing, Quiet
from fedlora.summary import in_words, read_metrics, read_rows
from fedlora.summary import read as read_summary
from fedlora.tables import merge, nested
from fedlora.tasks.metrics import Metric

if TYPE_CHECKING:
    from fedlora.models.load import Given
    from fedlora.runs.predict import Predictor
    from fedlora.runs.trainers import TrainerClient
    from fedlora.tasks.base import Answer

Row = dict[str, Any]
OnRound = Callable[[Row], object]
GIVEN = ".given"  # in a comparison's folder, what its processes cannot be given otherwise
FLAGS = {  # arguments -> the keys that they set
    "task": "task.name",
    "rank": "clients.rank",
    "clients": "clients.count",
    "alpha": "data.alpha",
    "rounds": "train.rounds",
    "epochs": "train.epochs",
    "seed": "seed",
}


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
    def summary(self) -> dict[str, Any] | None:
        """The scores of the result and the totals; None while the run is not finished."""
        return read_summary(self.folder)

    def predict(
        self,
        inputs: Sequence[Any],
        client: int | str | None = None,
        domain: str | None = None,
        base: bool = False,
        max_new_tokens: int | None = None,
    ) -> "list[Answer]":
        """The answer to each input, with what else there is to say: {"label": ..., "probability": ..., "probabilities": {...}}, or
        of a language model {"answer": ..., "tokens": ...}.

        Args:
            inputs: texts, or paths of images; of a language model also lists of messages.
            client: where clients have models of their own: whose, by number or name.
            domain: in a run of several data sets, the one that the inputs are of.
            base: of a language model: what it says as it was pre-trained, without what was learned.
            max_new_tokens: of a language model's answer; those of the run where it is left out.

        Raises:
            BadInput: there is no such model, or an input is none.
        """
        model = self.predictor(client, domain, base, max_new_tokens)
        return model.answers(list(model.task.inputs(list(inputs))))

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

    def model(self, client: int | str | None = None) -> Any:
        """The model as PyTorch has it, for inference: a `peft.PeftModel`, or a whole one where no adapter can hold the result.
        Where clients have trainers of their own, it is the model of the first one's, or of the client's, which then is this.
        BadInput: see `save_adapter`."""
        from fedlora.runs.export import model_of

        if self.config.train.trainer is not None:
            from fedlora.runs.trainers import show

            return show(self.folder, self._clients, client).hf.adapter.model.eval()
        return model_of(self.folder, client, self._given)

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

        export(self.folder, Path(to), client, merged, self._given, self._clients, rank)
        return Path(to)

    def report(self, html: str | Path | None = None) -> Path:
        """Write the page about the run, report.html in its folder or `html`; returns where it is."""
        from fedlora.comparison.run import write_report

        return write_report([self.folder], None if html is None else Path(html))

    def __str__(self) -> str:
        done, rows = self.summary, self.rows
        if done is not None:
            return f"{in_words(done, self.metrics)}  after {done['rounds']} rounds"
        return f"{len(rows)} of {self.config.train.rounds} rounds in {self.folder}"

    def _repr_html_(self) -> str:
        from fedlora.report.notebook import summary

        return summary([self.folder]) if self.rows else f"<p>{self}</p>"


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
        on_round: hears each row; the run ends after a round for which it returns True, with that round's model as the result.
        progress: whether to show what goes on.

    Raises:
        BadInput: something cannot be, in one line: what, where, what is possible. Nothing was written.
        RunFailed: the run stopped, and can be resumed.
    """
    joining = _joining(data)
    own, tables = _model(model, tokenizer), None if data is None or joining else given(data)
    flags = {"task": task, "rank": rank, "clients": clients, "alpha": alpha, "rounds": rounds, "epochs": epochs, "seed": seed}
    if joining:
        settings = {**(settings or {}), "train.trainer": f"given:{type(joining[0].hf.trainer).__name__}"}
    layers = [*_layers(flags, model, own, tables, settings), *([] if method is None else [{"method": as_table(method)}])]
    folder, place = _folder(out)
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
            clients=joining,
        )
    return Run(folder, tuple(notes), own, place, joining)


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


def load(folder: str | Path, model: Any = None, tokenizer: Any = None) -> Run:
    """A run in its folder. BadInput when it is none.

    Args:
        model, tokenizer: those that the run was given itself, if it was.
    """
    own = _model(model, tokenizer)
    found = Run(Path(folder), (), own)
    source = found.config.model.source
    if own is not None and own.source != source:
        raise BadInput(f"model: the run in {folder} was made with {source}, and this is {own.source}")
    return found


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison in its folder.

    Attributes:
        folder: of the comparison.
        failed: how many of its runs failed.
    """

    folder: Path
    failed: int
    _place: Any = field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> list[Row]:
        """A row a run: what was varied, the scores, the bytes."""
        from pyarrow import parquet

        rows: list[Row] = parquet.read_table(self.folder / "results.parquet").to_pylist()
        return rows

    def report(self, html: str | Path | None = None) -> Path:
        """Write the page about the comparison; returns where it is."""
        from fedlora.comparison.run import write_report

        return write_report([self.folder], None if html is None else Path(html))

    def __str__(self) -> str:
        return (self.folder / "results.md").read_text()

    def _repr_html_(self) -> str:
        from fedlora.report.notebook import summary

        return summary([self.folder / "cells" / row["hash"] for row in self.rows if row["status"] == "done"])


def compare_methods(
    methods: Sequence[Any],
    *,
    data: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    task: str | None = None,
    rank: int | Sequence[int] | str | None = None,
    clients: int | None = None,
    alpha: float | Sequence[float] | None = None,
    rounds: int | None = None,
    epochs: int | None = None,
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
        rank, alpha, seed and other keys of `settings`: a list runs each of its values (a list of ranks by client is a list in it).
        out: the folder; continued where it is there.
        jobs: how many run at a time.
        title: of the report.

    The others are those of `run`. Raises BadInput.
    """
    from fedlora.comparison.recipe import Header, Recipe
    from fedlora.comparison.run import play_recipe

    if not methods:
        raise BadInput("methods: at least one is needed")
    own, tables = _model(model, tokenizer), given(data) if data is not None else None
    flags = {"task": task, "rank": rank, "clients": clients, "alpha": alpha, "rounds": rounds, "epochs": epochs, "seed": seed}
    folder, place = _folder(out)
    layers = [*_layers(flags, model, own, tables, settings), {"method": [as_table(each) for each in methods]}]
    whole = merge(*layers, *_at_hand(folder, own, tables, merge(*layers)))
    recipe = Recipe(Header(title=title or "A comparison of methods", name="methods"), whole)
    return Comparison(folder, play_recipe(recipe, folder, jobs, not progress), place)


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
            write(data, folder / data.name, _label(config.data.label))

    return execute(config, out, resume, listener, profile, keep=keep, given=own, clients=clients)


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
    own: "Given | None",
    data: str | list[str] | Data | None,
    settings: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """The tables that arguments set, `settings` over them."""
    keys: dict[str, Any] = {FLAGS[name]: value for name, value in flags.items()}
    keys["model.source"] = own.source if own is not None else None if model is None else str(model)
    if isinstance(data, Data):
        keys["data.source"] = f"{RUN}{data.name}"
        keys |= {"data.column": data.column, "data.partition": "column"} if data.column is not None else {}
    else:
        keys["data.source"] = data
    return [nested(key, _plain(value)) for key, value in (*keys.items(), *(settings or {}).items()) if value is not None]


def _at_hand(
    folder: Path, own: "Given | None", data: str | list[str] | Data | None, tables: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a comparison's processes are told of what is at hand here: files in its folder, which are written where they lack."""
    found = []
    if isinstance(data, Data):
        place = folder.absolute() / GIVEN / data.name
        if not place.exists():
            write(data, place, _label(tables.get("data", {}).get("label", "label")))
        found.append(nested("data.source", str(place)))
    if own is not None:
        from fedlora.models.quiet import quiet

        place = folder.absolute() / GIVEN / own.source.replace(":", "-")
        if not place.exists():
            with quiet():
                own.model.save_pretrained(place)
                own.processor.save_pretrained(place)
        found.append(nested("model.source", str(place)))
    return found


def _joining(data: Any) -> "tuple[TrainerClient, ...]":
    """The clients with trainers of their own, where `data` is a list of such."""
    if not isinstance(data, list | tuple) or not any(hasattr(each, "hf") for each in data):
        return ()
    from fedlora.runs.trainers import TrainerClient

    other = next((each for each in data if not isinstance(each, TrainerClient)), None)
    if other is not None:
        raise BadInput(f"data: {type(other).__name__} beside clients; either each is fedlora.client(trainer), or none")
    return tuple(replace(each, name=each.name or f"client-{i}") for i, each in enumerate(data))


def _label(columns: str | list[str]) -> str:
    return columns if isinstance(columns, str) else columns[0]


class _Temporary:
    """A folder that is gone when nothing holds this any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fedlora-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _folder(out: str | Path | None) -> tuple[Path, _Temporary | None]:
    """Where to write, and what keeps it: a temporary folder where none is named."""
    if out is not None:
        return Path(out), None
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

    from fedlora.models.load import Given, processor_of

    kind = type(model).__name__
    if hasattr(model, "peft_config"):
        raise BadInput(f"model: {kind} holds an adapter already; merge it first (merge_and_unload), or give its base")
    if not isinstance(model, PreTrainedModel):
        raise BadInput(f"model: {kind} is no model of transformers; possible: a PreTrainedModel, or a model's name or folder")
    if getattr(model, "is_quantized", False):
        raise BadInput(f"model: {kind} is quantised, and its weights cannot be read back; give it as it was before")
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
        stop = super().round(row)
        return stop or (self.on_round is not None and self.on_round(dict(row)) is True)
