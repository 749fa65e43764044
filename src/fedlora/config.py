"""The configuration of a run: eight tables and a list of transforms, every key with its default, checked whole at the start.

A recipe is TOML with these tables. `--set table.key=value` reaches every key; the short flags of the command line are names
for some of them. An unknown key is an error that gives the nearest names.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedlora.errors import BadInput, unknown
from fedlora.names import short
from fedlora.settings import refuse_boolean
from fedlora.tables import merge


class HeadMode(Enum):
    """Who trains the classification head."""

    FROZEN = "frozen"  # nobody: one random draw, the same on every client (the papers' choice)
    SHARED = "shared"  # every client, averaged by number of examples
    PERSONAL = "personal"  # every client its own


class Partition(Enum):
    """How training and test examples are dealt to clients."""

    DIRICHLET = "dirichlet"  # for each class, shares drawn from Dirichlet(alpha)
    IID = "iid"
    PATHOLOGICAL = "pathological"  # pairs of clients share pairs of classes
    COLUMN = "column"  # the natural owners that a column names
    STRATA = "strata"  # each stratum has an owner of its own: a data set, a cluster, a band of lengths


class Strata(Enum):
    """What clients are dealt unequal shares of."""

    LABEL = "label"  # the classes; tenths of the numbers where targets are numbers
    COLUMN = "column"  # the values of a column
    DOMAIN = "domain"  # the data sets of a run of several
    LENGTH = "length"  # tenths by how long an input is
    CLUSTER = "cluster"  # clusters of what the pre-trained model makes of the inputs


class RankPlan(Enum):
    """Named ways to give clients different ranks of 2, 4, 8, 16 and 32."""

    TIERS = "tiers"  # client k has 2^((k mod 5) + 1)
    HEAVY_TAIL = "heavy-tail"  # most clients small: 20, 6, 2, 1, 1 of 30
    NORMAL = "normal"  # a bell around 4: 7, 13, 8, 2, 0 of 30


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"  # of a client between machines: of a file and of a host, too
RANK_SHARES = {RankPlan.HEAVY_TAIL: (20, 6, 2, 1, 1), RankPlan.NORMAL: (7, 13, 8, 2, 0)}


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1."""
        if cls.model_fields[str(info.field_name)].annotation is not bool:
            refuse_boolean(value)
        return value


class TaskConfig(BaseModel):
    """The kind of data and of answers: its name; its own fields stand beside it.

    Attributes:
        name: of a task, or package.module:Class.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "text_classification"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class MethodConfig(BaseModel):
    """The method's name; its own fields stand beside it.

    Attributes:
        name: of a method, as `fedlora methods` lists them, or package.module:Class.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "lora-a2"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelConfig(Table):
    """The pre-trained model, and where its adapter goes.

    Attributes:
        source: minilm or smollm2 (packaged), a local folder, a GGUF file, or a Hub id of an encoder or decoder; of images: mlp,
            vit-tiny, or such a place.
        head: who trains the classifier on top: nobody, everybody together, or each client its own.
        target_modules: the linear layers with an adapter: all-linear for all of the blocks, a list of names or their ends, or a
            pattern for whole paths.
        lora_alpha: LoRA's alpha; the update is B A times alpha / rank.
        rslora: scale by alpha / sqrt(rank) instead.
        quantise: of language models: bits of the frozen base's linear layers (bitsandbytes); as they are where it is not set.
    """

    source: str = "minilm"
    head: HeadMode = HeadMode.FROZEN
    target_modules: str | list[str] = "all-linear"
    lora_alpha: PositiveFloat = 16.0
    rslora: bool = False
    quantise: Literal["4bit", "8bit"] | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One source: where it is, its columns, how its files are written, and how many of its examples to keep or to hold out; the
    keys of `DataConfig` for it alone.

    `nested` names further columns to read, in whose values may be lists and objects: of a file of JSON, they become its text.
    """

    source: str
    text: str
    label: str
    column: str | None = None
    limit: int | None = None
    test_limit: int | None = None
    validation: float = 0.0
    delimiter: str | None = None
    encoding: str | None = None
    image: str = "image"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    choices: str | None = None
    nested: tuple[str, ...] = ()


class DataConfig(Table):
    """The data set: a catalogue name, a file, a folder or a Hub id; its columns; and how clients come by it.

    A list of sources is a run of several domains, one a source: their columns are one name for all or a list, and `limit`,
    `test_limit`, `validation` and `min_size` hold for each domain.

    Attributes:
        source: 20newsgroups, banking77 or arithmetic (digits of images), a file, a folder, or a Hub id; a list of them is several
            domains.
        text: the column of texts.
        label: the column of labels.
        image: the column of images.
        prompt: of language models: the column of prompts, texts or lists of messages; found by its name where it is not set.
        completion: the column of what is to be answered, likewise; of multiple choice, the right choice.
        messages: the column of chats, lists of messages with a role and a content; found by its name where it is not set.
        choices: the column of lists of choices; found by its name where it is not set.
        delimiter: one character that separates columns of csv files; found out where it is not set.
        encoding: of text files, by Python's name for it; found out where it is not set.
        limit: how many training examples to keep, drawn by seed.
        test_limit: how many test examples to keep, drawn by seed.
        validation: the share of the training examples that is held out to choose the round by.
        max_length: tokens at which texts are cut.
        partition: how examples are dealt to clients.
        alpha: Dirichlet's concentration: the smaller, the more clients differ in their shares of the strata.
        strata: what a partition deals unequal shares of.
        column: the column that names the owner of each row, where clients are the real ones, or its stratum.
        min_size: the fewest training examples of a client.
    """

    source: str | list[str] = "20newsgroups"
    text: str | list[str] = "text"
    label: str | list[str] = "label"
    image: str = "image"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    choices: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_length: PositiveInt = 128
    partition: Partition = Partition.DIRICHLET
    alpha: PositiveFloat = 0.5
    strata: Strata = Strata.LABEL
    column: str | None = None
    min_size: PositiveInt = 1

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise ValueError('one character that separates columns, such as ",", ";" or "|", or "\\t" for a tab')
        return delimiter

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        try:
            "a".encode(encoding or "utf-8")
        except (LookupError, ValueError):
            raise ValueError("not an encoding of text; possible: utf-8, cp1252, latin-1, utf-16 and others of Python's") from None
        return encoding

    @property
    def sources(self) -> list[SourceConfig]:
        """Each source and its columns."""
        names = [self.source] if isinstance(self.source, str) else self.source
        texts, labels = ([x] * len(names) if isinstance(x, str) else x for x in (self.text, self.label))
        own = {f.name: getattr(self, f.name) for f in fields(SourceConfig) if f.name not in ("source", "text", "label", "nested")}
        return [SourceConfig(*each, **own) for each in zip(names, texts, labels, strict=True)]

    @property
    def title(self) -> str:
        """What the data is called in messages and pictures."""
        return " + ".join(short(each.source) for each in self.sources)


class ClientsConfig(Table):
    """Who takes part.

    Attributes:
        count: how many clients; 10 where the data names no owners and nothing is said.
        rank: of their adapters: a number, a list by client, or a plan of different ones.
        sample: how many (an integer) or what share (up to 1.0) of them take part in a round.
        domains: how many of the run's domains each holds.
        held_out: how many (an integer) or what share (below 1.0) of the clients never train; the final model is scored on them.
        names: of the clients of a federation between machines, who are numbered in the order of their names.
    """

    count: PositiveInt | None = None
    rank: PositiveInt | list[PositiveInt] | RankPlan = 8
    sample: PositiveInt | float = 1.0
    domains: PositiveInt = 1
    held_out: PositiveInt | float | None = None
    names: list[Annotated[str, Field(pattern=NAME)]] | None = None

    @field_validator("names")
    @classmethod
    def _in_order(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and (len(set(names)) < len(names) or not names):
            raise ValueError("each client has a name of its own, and there is at least one")
        return names and sorted(names)


class TrainConfig(Table):
    """The length of the run, the local optimiser, and how often the test set is scored.

    Attributes:
        rounds: rounds of federated training.
        epochs: local epochs of a client in a round; with max_steps, the passes that its steps are divided into.
        max_steps: steps of a client in a round, however many examples it has; where they outlast its data, the next epoch begins.
        batch_size: examples in a client's step.
        lr: learning rate of the local optimiser, which starts anew in each round.
        schedule: how the learning rate goes over the rounds; within a round it stays. A run that is resumed with more rounds goes
            on with the schedule of so many.
        warmup: how many rounds (an integer) or what share of them (below 1.0) the learning rate rises for before.
        floor: what share of it is left in the last round, where the schedule is linear or cosine.
        optimizer: the local optimiser.
        weight_decay: of the local optimiser.
        clip: the largest norm of a step's gradient.
        evaluate_every: rounds from one scoring of the test set to the next; the last round is always scored.
        patience: scored rounds without a better score on the validation part after which the run ends.
        micro_tokens: the most tokens that pass at once; longer batches pass in pieces, whose gradients add up to the same step.
        rows: tokens of several clients' batches that share a step, where it is not what suits the device; with 1 every client
            trains by itself.
        checkpointing: keep of a forward pass only what enters each block, and compute the rest again in the backward pass: less
            memory, more time, the same gradients.
        trainer: makes the trainers of clients that bring their own: package.module:function, from a client's name to its
            transformers.Trainer, which then decides on data, model and local training.
    """

    rounds: PositiveInt = 10
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    lr: PositiveFloat = 5e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: NonNegativeInt | float = 0
    floor: Annotated[float, Field(gt=0, le=1)] = 0.02
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: NonNegativeFloat = 0.01
    clip: PositiveFloat | None = None
    evaluate_every: PositiveInt = 1
    patience: PositiveInt | None = None
    micro_tokens: PositiveInt | None = None
    rows: PositiveInt | None = None
    checkpointing: bool = False
    trainer: str | None = None


class TransformConfig(BaseModel):
    """A transform of clients' changes: its name; its own fields stand beside it.

    Attributes:
        name: of the transform.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TrackConfig(Table):
    """Where the numbers of a run are sent while it goes on. Nothing here changes a result, and all of it may change on --resume.

    Attributes:
        to: trackers, of tensorboard, wandb and mlflow; each needs its package.
        project: the project of wandb, and the experiment of mlflow.
        name: what they call the run; its folder's name where nothing is said.
        uri: of mlflow's server or data base; a file in the run's folder where nothing is said.
        mode: of wandb; as WANDB_MODE says where nothing is said, and without that online where WANDB_API_KEY is set.
    """

    to: list[str] = []
    project: Annotated[str, Field(min_length=1)] = "fedlora"
    name: Annotated[str, Field(min_length=1)] | None = None
    uri: Annotated[str, Field(min_length=1)] | None = None
    mode: Literal["offline", "online"] | None = None


class TransportConfig(Table):
    """Where clients are played, and how a federation waits for them. All of it may change on --resume.

    Attributes:
        name: where; fedlora federate does not ask.
        workers: by default one a GPU of a Ray cluster, else one for every four processors.
        address: of a Ray cluster; left out, one is started here.
        quorum: how many (an integer) or what share (up to 1.0) of those who are asked must have answered; later answers of the
            round are dropped.
        oversample: how many more are asked than clients.sample says, as a share of them; the quorum is of those that it says.
        timeout: minutes after which a round goes on without those who have not answered.
        absence: minutes for which a client that is not connected is waited for.
        start: minutes for which the first round waits for all clients to be there.
        retries: how often a client is asked again that could not answer, and a round that nobody answered.
    """

    name: Literal["in_process", "processes", "ray"] = "in_process"
    workers: PositiveInt | None = None
    address: str | None = None
    quorum: PositiveInt | float = 1.0
    oversample: NonNegativeFloat = 0.0
    timeout: PositiveFloat = 30.0
    absence: NonNegativeFloat = 2.0
    start: PositiveFloat = 60.0
    retries: NonNegativeInt = 10

    @field_validator("quorum")
    @classmethod
    def _of_those(cls, quorum: int | float) -> int | float:
        if isinstance(quorum, float) and not 0 < quorum <= 1:
            raise ValueError("a share lies in (0, 1], a number of clients is an integer")
        return quorum


class Config(Table):
    """A whole run.

    Attributes:
        seed: of every random draw; the same seed gives the same run.
        device: where to compute; auto is a GPU where there is one.
        precision: of the frozen model; auto is bf16 where the hardware has it.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    task: TaskConfig = Field(default_factory=TaskConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    transport: TransportConfig = Field(default_factory=TransportConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    transform: list[TransformConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        if self.data.partition is Partition.COLUMN and self.data.column is None:
            raise ValueError('data.partition = "column" needs data.column, the column that names the owner')
        owners, groups = self.data.partition is Partition.COLUMN, self.data.strata is Strata.COLUMN
        if groups and self.data.column is None:
            raise ValueError('data.strata = "column" needs data.column, the column that names the stratum')
        if groups and owners:
            raise ValueError('data.strata = "column" and data.partition = "column": one column names owners or strata, not both')
        if self.data.column is not None and not (owners or groups):
            raise ValueError(
                f'data.column is set, so data.partition must be "column", not "{self.data.partition.value}" '
                '(or data.strata = "column")'
            )
        if self.data.messages is not None and (self.data.prompt or self.data.completion or self.data.choices):
            raise ValueError("data.messages is set, so data.prompt, data.completion and data.choices cannot be: a chat has none")
        if self.data.choices is None and (self.data.prompt is None) != (self.data.completion is None):
            raise ValueError("data.prompt and data.completion are set together: one names the prompts, one their answers")
        self._agree_on_sources()
        share, apart = self.clients.sample, self.clients.held_out
        if isinstance(share, float) and not 0 < share <= 1:
            raise ValueError(f"clients.sample = {share}: a share lies in (0, 1], a number of clients is an integer")
        if isinstance(apart, float) and not 0 < apart < 1:
            raise ValueError(f"clients.held_out = {apart}: a share lies in (0, 1), a number of clients is an integer above 0")
        warmup, rounds = self.train.warmup, self.train.rounds
        if isinstance(warmup, float) and not 0 <= warmup < 1:
            raise ValueError(f"train.warmup = {warmup}: a share lies in [0, 1), a number of rounds is an integer of at least 0")
        if warmup > rounds:
            raise ValueError(f"train.warmup = {warmup}: the run has {rounds} rounds")
        return self

    def _agree_on_sources(self) -> None:
        count = 1 if isinstance(self.data.source, str) else len(self.data.source)
        if count == 0:
            raise ValueError("data.source = []: at least one source is needed")
        if any(not name.strip() for name in ([self.data.source] if isinstance(self.data.source, str) else self.data.source)):
            raise ValueError('data.source = "": a data set\'s name, a file, a folder or a Hugging Face id (org/name) is needed')
        for key, columns in (("text", self.data.text), ("label", self.data.label)):
            if not isinstance(columns, str) and (isinstance(self.data.source, str) or len(columns) != count):
                raise ValueError(f"data.{key} lists {len(columns)} columns, but data.source names {count} source(s)")
        if self.clients.domains > count:
            raise ValueError(f"clients.domains = {self.clients.domains}: the run has {count} domain(s), one for each data.source")
        if count > 1 and self.data.partition is Partition.COLUMN:
            raise ValueError('data.partition = "column" takes one data.source, not a list')


def resolve(*layers: Mapping[str, Any]) -> Config:
    """The configuration of several layers of nested tables, the later ones winning.

    Raises:
        BadInput: names the key, its value, and what is possible.
    """
    try:
        return Config.model_validate(merge(*layers))
    except ValidationError as error:
        raise _explain(error) from error


def read_recipe(path: str) -> dict[str, Any]:
    """The tables of a recipe: a TOML file, or the name of a packaged recipe."""
    file = Path(path)
    if not file.suffix and not file.is_file():
        packaged = {f.name.removesuffix(".toml"): f for f in files("fedlora.recipes").iterdir() if f.name.endswith(".toml")}
        if path not in packaged:
            raise unknown("recipe", path, packaged)
        return tomllib.loads(packaged[path].read_text())
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid TOML: {error}") from error


def read_run(folder: Path) -> Config:
    """The configuration of a run folder, which its run has written whole. BadInput when it is missing or damaged."""
    file = folder / "config.toml"
    if not file.is_file():
        raise BadInput(f"{folder} is no run folder: it has no config.toml")
    try:
        tables = read_recipe(str(file))
        lost = [name for name in ("method", "model", "data", "clients", "train") if name not in tables]
        if lost:
            raise BadInput(f"config.toml has no {' and no '.join(lost)}")
        return resolve(tables)
    except BadInput as error:
        raise BadInput(f"{folder}: a damaged run folder: {error}") from error


def to_toml(config: Config) -> str:
    """The whole resolved configuration; reading it back gives the same one."""
    import tomli_w

    return tomli_w.dumps(as_tables(config))


def as_tables(config: Config) -> dict[str, Any]:
    """Plain nested tables, without the keys that are not set."""
    return config.model_dump(mode="json", exclude_none=True)


def decisive(config: Config) -> dict[str, Any]:
    """The tables that a run's numbers depend on: neither how long is waited for clients nor who hears of them."""
    return {name: table for name, table in as_tables(config).items() if name not in ("transport", "track")}


def _explain(error: ValidationError) -> BadInput:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        return unknown("config key", key, _keys_beside(place))
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        return BadInput(message)
    table_key = ".".join(place[:2])  # past it stand pydantic's names for the members of a union
    return BadInput(f"{table_key} = {first['input']!r}: {message}")


def _keys_beside(place: Iterable[str]) -> list[str]:
    keys = []
    for name, info in Config.model_fields.items():
        keys.append(name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys.extend(f"{name}.{inner}" for inner in info.annotation.model_fields)
    return keys
