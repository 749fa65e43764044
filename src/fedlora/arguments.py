"""What the arguments of the Python API mean: tables of a configuration, models and places."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import read_recipe
from fedlora.data.given import RUN, Data
from fedlora.errors import BadInput, brief, in_python
from fedlora.tables import nested

if TYPE_CHECKING:
    from fedlora.models.load import Given
    from fedlora.runs.trainers import TrainerClient

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
def as_in_python() -> Iterator[None]:
    """What goes wrong is said in the words of functions, not of the command line."""
    try:
        yield
    except BadInput as error:
        raise BadInput(in_python(str(error))).with_traceback(error.__traceback__) from error.__cause__


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


def layers_of(
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


def joining(data: Any) -> "tuple[TrainerClient, ...]":
    """The clients with trainers of their own, where `data` is a list of such."""
    if not isinstance(data, list | tuple) or not any(hasattr(each, "hf") for each in data):
        return ()
    from fedlora.runs.trainers import TrainerClient

    other = next((each for each in data if not isinstance(each, TrainerClient)), None)
    if other is not None:
        raise BadInput(f"data: {type(other).__name__} beside clients; either each is fedlora.client(trainer), or none")
    return tuple(replace(each, name=each.name or f"client-{i}") for i, each in enumerate(data))


def name_of(own: "Given", run: Path | None) -> str:
    """What a configuration calls a model that is at hand; that of a run, as the version did that began it."""
    recorded = read_recipe(str(run / "config.toml")).get("model", {}) if run and (run / "config.toml").exists() else {}
    return own.earlier if recorded.get("source") == own.earlier else own.source


def path_of(name: str, value: Any) -> Path:
    """The path that an argument is. BadInput where it is none."""
    if not isinstance(value, str | PathLike):
        raise BadInput(f"{name}: {brief(value)} is no path")
    return Path(value).expanduser()


@contextmanager
def writing(name: str, place: Path) -> Iterator[None]:
    """BadInput where nothing can be written in a place that an argument names."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{name} {place}: cannot be written: {error.strerror or error}") from error


class Temporary:
    """A folder that is gone when nothing holds this any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fedlora-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def place_of(out: str | Path | None) -> tuple[Path, Temporary | None]:
    """Where to write, and what keeps it: a temporary folder where none is named."""
    if out is not None:
        return path_of("out", out), None
    place = Temporary()
    return place.path / "run", place


def one_run(name: str, tables: Mapping[str, Any]) -> Mapping[str, Any]:
    from fedlora.comparison.recipe import is_comparison

    if is_comparison(tables):
        raise BadInput(f"{name} is a recipe for several runs; start it with: fedlora compare {name}")
    return tables


def model_of(model: Any, processor: Any) -> "Given | None":
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
