"""The worker of a client on its own machine: `python -m fedlora.runs.federation.node HOME`; `clients.reach` starts it."""

import sys
from functools import partial
from pathlib import Path

import numpy as np

from fedlora.clients.node import Node, serve
from fedlora.clients.state import StateStore
from fedlora.clients.worker import Examples, Worker
from fedlora.config import Config
from fedlora.data.dataset import Dataset
from fedlora.data.domains import domain_counts
from fedlora.data.load import load as load_data
from fedlora.data.partition import Parts
from fedlora.disk import write_whole
from fedlora.errors import BadInput, RunFailed
from fedlora.listener import Quiet
from fedlora.messages import TEST, VALIDATION, Present
from fedlora.runs import fit
from fedlora.runs.federation import outline
from fedlora.runs.federation.folder import Federation, Home, number_of, roster
from fedlora.runs.packages import require
from fedlora.runs.prepare import load_model, make_method, make_setup, make_task
from fedlora.runs.saved import STATES
from fedlora.training.length import lr_factor
from fedlora.transforms import pipeline
from fedlora.types import Client
from fedlora.wire import message_classes

DIGEST = "data.digest"


class Log(Quiet):
    """Says what a worker does in its log."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def note(self, text: str) -> None:
        self.say(f"note: {text}")

    def stage(self, text: str) -> None:
        self.say(f"{text} ...")


def own_config(federation: Federation, data: str, model: str) -> Config:
    """The federation's configuration with this machine's data and model."""
    config = federation.config
    own = {"data": config.data.model_copy(update={"source": data}), "model": config.model.model_copy(update={"source": model})}
    return config.model_copy(update=own)


def prepare(home: Home, listener: Log) -> Node:
    """The client of a home, ready to be asked. BadInput: why it cannot take part."""
    what = home.read()
    federation, name = Federation(Path(what["federation"])), str(what["name"])
    config = own_config(federation, what["data"], what["model"])
    require(config)
    expected = outline.read(federation)
    task, method = make_task(config), make_method(config)
    transforms = pipeline.make(config.transform, method, config.seed, config.model.head)
    listener.stage(f"reading {config.data.title}")
    dataset = load_data(task, config.data, config.seed, schema=expected.schema)
    for note in dataset.notes:
        listener.note(note)
    loaded = load_model(config, task, dataset.schema, listener)
    pretrained, trainer, limit = loaded.pretrained, loaded.trainer, loaded.findings.limit
    dataset = task.fitting(dataset, pretrained, limit)
    dataset = task.dealt(dataset, _all(dataset, name))
    _require_same_data(home, dataset)
    listener.stage("encoding")
    train, test = (task.encode(pretrained, part, limit) for part in (dataset.train, dataset.test))
    parts = (
        {TEST: test}
        if dataset.validation is None
        else {
            TEST: test,
            VALIDATION: task.encode(pretrained, dataset.validation, limit),
        }
    )
    for note in task.notes(train, test, limit):
        listener.note(note)
    everybody = roster(config)
    mine = everybody[number_of(config, name)]
    client = Client(mine.id, mine.rank, len(train), domain_counts(dataset, np.arange(len(train))))
    setup = make_setup(config, trainer, [client if each.id == client.id else each for each in everybody])
    fit.check(config, method, setup, trainer, train, loaded.there)
    worker = Worker(
        method,
        setup,
        trainer,
        {client.id: Examples(train, parts, loaded.objective.constant(train))},
        config.model.head,
        StateStore(home.path / STATES, message_classes(method)),
        transforms,
        lr_factor=partial(lr_factor, config.train),
    )
    present = Present(
        name,
        client.num_examples,
        dict(client.domains),
        len(test),
        len(parts.get(VALIDATION, ())),
        outline.facts(config, expected.schema, loaded),
    )
    return Node(worker, client, present, home.path, listener.say)


def _all(dataset: Dataset, name: str) -> Parts:
    """All examples are one client's."""
    own = {part: (np.arange(len(split)),) for part, split in dataset.parts}
    return Parts(own["training"], own["test"], (name,), "all of one", own.get("validation", ()))


def _require_same_data(home: Home, dataset: Dataset) -> None:
    """BadInput where a client goes on with other data than it began with: what it keeps, and what the server knows of it, is of
    those. The digest never leaves its machine."""
    file = home.path / DIGEST
    if not file.exists():
        write_whole(file, dataset.digest.encode())
    elif file.read_text() != dataset.digest:
        raise BadInput(
            "its data has changed since it first took part; bring back the data that it began with, or begin a federation anew "
            f"with an empty home (not {home.path})"
        )


def main(path: Path) -> int:
    """Answer until nobody asks any more; the exit status, where there is nothing to answer with."""
    home = Home(path.resolve())
    try:
        threads = home.read()["threads"]
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        serve(home.path, lambda: prepare(home, Log()), attended=home.attended)
    except (BadInput, RunFailed) as error:
        print(f"error: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
