"""MLflow: a data base in RUN/track/mlflow.db, or the server or data base that track.uri names.

Look at the file with `mlflow ui --backend-store-uri sqlite:///RUN/track/mlflow.db`. Parameters are the configuration with which the
run began, for MLflow lets none change; who failed is a tag a round.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from fedlora.config import as_tables
from fedlora.track.base import Kept, Point, Run

MOST = {"metrics": 1000, "params": 100}  # of a request


class MLflow:
    """Logs to one run, by its id, and makes none the active one."""

    client: Any
    id: str

    def start(self, run: Run, first: int, kept: Kept) -> Kept:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves this machine that was not asked for
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # its own: or it tells of every table that it makes
        self.client = MlflowClient(tracking_uri=run.config.track.uri or f"sqlite:///{run.place / 'mlflow.db'}")
        if "id" in kept:
            self.id = kept["id"]
            self.client.update_run(self.id, status="RUNNING")
            return kept
        found = self.client.get_experiment_by_name(run.config.track.project)
        experiment = found.experiment_id if found else self.client.create_experiment(run.config.track.project)
        self.id = self.client.create_run(experiment, run_name=run.name).info.run_id
        leaves = _leaves(as_tables(run.config))
        while params := [Param(named(key), text) for key, text in islice(leaves, MOST["params"])]:
            self.client.log_batch(self.id, params=params)
        return {"id": self.id}

    def round(self, point: Point) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = (Metric(named(name), x, now, point.step) for name, x in point.numbers.items())
        while batch := list(islice(metrics, MOST["metrics"])):
            self.client.log_batch(self.id, metrics=batch)
        for name, text in point.texts.items():
            self.client.set_tag(self.id, f"{name}.{point.step}", text[:5000])

    def finish(self, point: Point) -> None:
        self.round(point)
        self.client.set_terminated(self.id, "FINISHED")

    def close(self) -> None:
        if self.client.get_run(self.id).info.status == "RUNNING":
            self.client.set_terminated(self.id, "KILLED")  # it may go on later


def named(name: str) -> str:
    """A name that MLflow takes: of letters, digits, spaces and _ - . /, and no path that leads up."""
    parts = (re.sub(r"[^\w\-. ]", "_", part) for part in name.split("/"))
    return "/".join(part if part.strip(".") else "_" for part in parts)[:250]


def _leaves(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)[:5000]


TRACKER = MLflow
