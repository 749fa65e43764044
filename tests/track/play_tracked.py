"""Plays a run as its first argument, JSON, says, and prints what trackers left of it; for a side environment.

{"configs": one a start of the run, "out": its folder, "stops": after which round each start is stopped, "seconds": patience}
"""

import json
import logging
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import Silent

from fedlora.config import resolve
from fedlora.runs import play
from fedlora.track import thread

LOG_BLOCK, LOG_HEAD = 32768, 7  # of the format in which wandb keeps a run


def process() -> list[Any]:
    """What no tracker may change."""
    root = logging.getLogger()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    return [sys.stdout, sys.stderr, sys.exit, sys.excepthook, root.level, list(root.handlers), handlers, torch.get_num_threads()]


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows of an offline run's file: records of protocol buffers, in blocks, each piece with a head."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = file.read_bytes(), LOG_HEAD, b"", []
    while at + LOG_HEAD <= len(data):
        if LOG_BLOCK - at % LOG_BLOCK < LOG_HEAD:
            at += LOG_BLOCK - at % LOG_BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + LOG_HEAD])
        piece = data[at + LOG_HEAD : at + LOG_HEAD + size]
        at += LOG_HEAD + size
        whole = whole + piece if kind in (3, 4) else piece
        if kind in (1, 4):  # whole, or the last piece
            record = Record.FromString(whole)
            if record.HasField("history"):
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    return rows


def wandb_left(place: Path) -> list[Any]:
    """Of each start: its folder, and its history."""
    return [[file.parent.name, wandb_history(file)] for file in sorted(place.glob("wandb/offline-run-*/*.wandb"))]


def mlflow_left(place: Path, project: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name(project).experiment_id])
    return [
        {
            "name": run.info.run_name,
            "status": run.info.status,
            "params": run.data.params,
            "tags": run.data.tags,
            "metrics": {
                name: [[x.step, x.value] for x in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
            },
        }
        for run in runs
    ]


def main() -> None:
    job = json.loads(sys.argv[1])
    out, thread.SECONDS = Path(job["out"]), job["seconds"]
    before, notes = process(), []
    for config, stop in zip(job["configs"], job["stops"], strict=True):
        silent = Silent(stop)
        try:
            play.execute(resolve(config), out, out.exists(), silent)
        except KeyboardInterrupt:
            assert stop is not None
        notes += silent.notes
    found = {"same": process() == before, "notes": notes}
    place, to = out / "track", job["configs"][0]["track"]["to"]
    if (place / "wandb").exists():
        found["wandb"] = wandb_left(place)
    if (place / "mlflow.db").exists():
        found["mlflow"] = mlflow_left(place, "tests")
    print(json.dumps(found | {"to": to}))


if __name__ == "__main__":
    main()
