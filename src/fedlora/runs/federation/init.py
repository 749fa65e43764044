"""Makes a federation's folder: `fedlora federate init`."""

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from fedlora import __version__
from fedlora.config import Config, Partition, as_tables, resolve, to_toml
from fedlora.data.dataset import Schema
from fedlora.data.load import load as load_data
from fedlora.disk import founding
from fedlora.errors import BadInput
from fedlora.listener import Listener
from fedlora.runs.federation import outline
from fedlora.runs.federation.folder import CONFIG, EACH, Federation, absolute, roster
from fedlora.runs.packages import require
from fedlora.runs.prepare import load_model, make_method, make_setup, make_task, refuse_unserved
from fedlora.transforms import pipeline

PLACES = {  # template -> where it goes
    "app.pyproject.toml": "app/pyproject.toml",
    "app.py": "app/app.py",
    "README.md": "README.md",
    "make-certificates.sh": "make-certificates.sh",
    "make-key.sh": "make-key.sh",
    "nginx.conf": "nginx.conf",
    "fedlora-server.service": "systemd/fedlora-server.service",
    "fedlora-client.service": "systemd/fedlora-client.service",
    "Dockerfile": "docker/Dockerfile",
    "compose.yaml": "docker/compose.yaml",
}
FILLED = frozenset({"README.md", "nginx.conf", "fedlora-server.service", "fedlora-client.service", "Dockerfile", "compose.yaml"})


def federated(config: Config) -> Config:
    """A configuration as a federation has it: each client brings its own data. BadInput: it cannot be one."""
    if not config.clients.names:
        raise BadInput("--clients: who takes part, by name, as in --clients north,south,west")
    tables = as_tables(config)
    if not isinstance(config.data.source, str):
        raise BadInput("data.source: a federation has one data set, each client its part of it")
    if config.clients.held_out is not None:
        raise BadInput("clients.held_out: in a federation nobody is held out; leave a client out of clients.names")
    if config.train.trainer is not None:
        raise BadInput("train.trainer: in a federation clients train with fedlora's own trainer")
    tables["model"]["source"] = absolute(config.model.source)
    tables["data"] |= {"source": EACH, "partition": Partition.IID.value}
    for key in ("column", "limit", "test_limit"):
        tables["data"].pop(key, None)
    tables["clients"].pop("count", None)
    return resolve(tables)


def init(folder: Path, config: Config, labels: Sequence[str], address: tuple[str, int], listener: Listener) -> None:
    """Make the folder, whole.

    Args:
        config: its data are an example of what clients have, where `labels` does not say which classes there are.
        labels: the names of the classes.
        address: by which clients reach the server, and its port.

    Raises:
        BadInput: what cannot be; nothing is left then.
    """
    if os.path.lexists(folder):
        raise BadInput(f"{folder} exists already; name another folder")
    own = federated(config)
    require(own)
    task, method = make_task(config), make_method(config)
    refuse_unserved(own, task)
    pipeline.make(config.transform, method, config.seed, config.model.head)
    with founding(folder) as place:
        federation = Federation(place)
        if labels:
            if len(set(labels)) < max(2, len(labels)):
                raise BadInput(f"--labels {','.join(labels)}: each once, and at least two")
            schema = Schema(tuple(labels))
        else:
            listener.stage(f"reading {config.data.title}")
            schema = load_data(task, config.data, config.seed).schema
        loaded = load_model(own, task, schema, listener)
        found = outline.outline_of(own, schema, loaded)
        clients = roster(own)
        method.init(make_setup(own, outline.Outlined(found, loaded.objective), clients))  # what cannot be done without weights
        listener.stage("writing the folder")
        outline.write(federation, found)
        outline.save_processor(own, loaded, federation.model)
        (place / CONFIG).write_text(to_toml(own))
        _write_templates(place, own, address)
        for name in ("keys", "tls"):
            (place / name).mkdir()
        os.rename(place, folder)


def _write_templates(place: Path, config: Config, address: tuple[str, int]) -> None:
    names = config.clients.names or []
    host, port = address
    values = {
        "count": len(names),
        "clients": f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0],
        "first": names[0],
        "second": names[min(1, len(names) - 1)],
        "model": config.model.source,
        "method": make_method(config).FACTS.title,
        "rounds": config.train.rounds,
        "version": __version__,
        "host": host,
        "port": port,
    }
    source = files("fedlora.runs.federation") / "templates"
    for name, where in PLACES.items():
        text = (source / name).read_text()
        to = place / where
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(Template(text).substitute(values) if name in FILLED else text)
