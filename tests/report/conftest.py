"""Run folders written by hand, as a run writes them: curves that a formula gives, with nothing trained."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import save_file

from fedlora.config import as_tables, resolve

KINDS = ("attention.self.query", "attention.output.dense", "output.dense")
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)  # one black pixel


def modules(layers: int) -> list[str]:
    return [f"bert.encoder.layer.{i}.{kind}" for i in range(layers) for kind in KINDS]


@pytest.fixture
def write() -> Callable[..., Path]:
    """`write_run`, for tests: pytest's way to share a function."""
    return write_run


def write_run(
    folder: Path,
    tables: Mapping[str, Any],
    accuracy: Sequence[float | None],
    upload: int = 1_000_000,
    extra: Sequence[Mapping[str, Any]] = (),
    arrays: Mapping[int, Mapping[str, Any]] | None = None,
    clients: int = 4,
    layers: int = 2,
    label_names: Sequence[str] = ("a", "b"),
    written: int | None = None,
) -> Path:
    """A run of `len(accuracy)` rounds; train.rounds is that unless `tables` has it.

    Args:
        accuracy: by round; None where the test set was not scored.
        upload: bytes of each round; parameters are a quarter of it, downloads twice as much.
        extra: further row keys by round.
        arrays: by round.
        written: the round that validation chose; None where there was no validation.
    """
    folder.mkdir(parents=True)
    length = {"train": {"rounds": len(accuracy)}, "clients": {"count": clients}}
    config = resolve(length, tables)
    (folder / "config.toml").write_text(tomli_w.dumps(as_tables(config)))
    sizes = [{"id": i, "name": f"client {i}", "rank": 2, "num_examples": 10 + 7 * i, "num_test": 25} for i in range(clients)]
    federation = {"label_names": list(label_names), "modules": modules(layers), "clients": sizes}
    (folder / "federation.json").write_text(json.dumps(federation))
    (folder / "split.png").write_bytes(PIXEL)
    rows = []
    for t, value in enumerate(accuracy, 1):
        row = {"round": t, "loss": 1 / t, "accuracy": value, "macro_f1": value, "clients": clients, "failed": 0}
        row |= {"upload_params": upload // 4, "upload_bytes": upload, "download_params": upload // 2, "download_bytes": 2 * upload}
        row |= {"train_s": 8.0, "evaluate_s": 1.5, "aggregate_s": 0.25, "wall_s": 10.0}
        rows.append(row | dict(extra[t - 1] if extra else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for t, tensors in (arrays or {}).items():
        (folder / "arrays").mkdir(exist_ok=True)
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "arrays" / f"round-{t:05d}.safetensors")
    if len(accuracy) >= config.train.rounds or written:
        versions = {"fedlora": "0.1.0", "torch": "2.8.0"}
        summary: dict[str, Any] = {"device": "cpu", "precision": "float32", "versions": versions}
        summary |= {"rounds": len(accuracy), "final": {"accuracy": accuracy[-1]}}
        if written:
            early = len(accuracy) < config.train.rounds
            summary |= {"written": {"round": written, "by": "validation"}, "stopped_early": early}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
