"""A run's folder: made whole, checked before a run goes on, and finished with its result and summary."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import Config, decisive, read_recipe, resolve, to_toml
from fedlora.data.given import KEPT, same
from fedlora.disk import write_whole
from fedlora.errors import BadInput, RunFailed
from fedlora.runs.context import Played
from fedlora.runs.record import Record, clean
from fedlora.runs.roster import Roster, read_roster
from fedlora.runs.saved import CHECKPOINT
from fedlora.server import checkpoint
from fedlora.server.loop import Server
from fedlora.summary import exhausted, speechless, summarise


def finish(
    context: Played,
    last: Server,
    record: Record,
    out: Path,
    write: Callable[[Server, Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    held_out: Callable[[Server], Mapping[str, Any]],
) -> dict[str, Any]:
    """Write the result and, last, the summary: its presence says that the run is complete. `held_out` scores the model that is
    written on the clients that never trained; the others are as in `connect.Kind`."""
    rows = record.rows()
    metrics = context.trainer.objective.metrics
    summary = summarise(rows, metrics)
    written = summary["written"]["round"]
    if speechless(rows[written - 1]):
        raise RunFailed(f"round {written}: the model gives no finite numbers, so its training diverged; a lower train.lr may help")
    server = last
    if written != last.round:
        saved = checkpoint.load(out / CHECKPOINT, context.method, written)
        assert saved is not None
        server = saved.server
    written_as = write(server, rows[:written])
    summary |= {
        "stopped_early": last.round < context.setup.rounds,
        "out_of_patience": exhausted(rows, context.config.train.patience, metrics[0]),
        "seed": context.config.seed,
        "device": str(context.trainer.device),
        "precision": str(context.trainer.dtype).removeprefix("torch."),
        **written_as,
    }
    each = rows[written - 1].get(f"client_{metrics[0].name}", {}).values()
    spread = [score for score in each if score is not None]  # of some there may be nothing to score
    if spread:
        worst = sorted(spread, reverse=metrics[0].better == "lower")[: max(1, len(spread) // 10)]
        summary["clients"] = {"mean": float(np.mean(spread)), "worst_tenth": float(np.mean(worst))}
    if context.held_out:
        summary["held_out"] = clean(held_out(server))
    write_whole(out / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def found(context: Played, place: Path, out: Path, picture: Callable[[Path], None]) -> None:
    """Make the run folder, whole: it is built in `place` and renamed."""
    (place / "federation.json").write_text(context.roster.to_json())
    (place / "config.toml").write_text(to_toml(context.config))
    picture(place)
    os.rename(place, out)


def keep_again(keep: Callable[[Path], None], out: Path) -> None:
    """BadInput where `keep` would write other data than the run in `out` has kept; nothing is said where it writes none."""
    with tempfile.TemporaryDirectory() as place:
        keep(Path(place))
        for fresh in Path(place).iterdir():
            if not same(out / KEPT / fresh.name, fresh):
                raise BadInput(f"{out} was started with other data; leave data out to go on with its own, or use another out")


def require_same_run(config: Config, out: Path) -> None:
    """BadInput when `out` holds a run of another configuration; a larger number of rounds, and what follows the run, may change."""
    file = out / "config.toml"
    if not out.is_dir():
        raise BadInput(f"{out} is no folder")
    if not file.exists():
        raise BadInput(f"{out} is no run folder: it has no config.toml")
    written = read_recipe(str(file))
    before = resolve(checkpoint.configured(out / CHECKPOINT) or written)
    if config.train.rounds < before.train.rounds:
        raise BadInput(
            f"{out} was started with train.rounds = {before.train.rounds}; it can be raised, not lowered to {config.train.rounds}"
        )
    same = before.model_copy(update={"train": before.train.model_copy(update={"rounds": config.train.rounds})})
    changed = _differences(decisive(same), decisive(config))
    if changed:
        where = f"; {file} was changed" if _differences(decisive(before), decisive(resolve(written))) else "; use another --out"
        raise BadInput(f"{out} was started with another configuration: {'; '.join(changed)}{where}")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    out: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} was {a!r}, now {b!r}")
    return out


def check_roster(roster: Roster, out: Path) -> int:
    """BadInput when the run in `out` was started with other data; returns the tokens that fill a step of it."""
    file = out / "federation.json"
    before = read_roster(file)
    if before != roster:
        raise BadInput(
            f"{out} was started with other data: the clients of {file} are not those of data.source now; use another --out"
        )
    if before.data is not None and before.data != roster.data:
        raise BadInput(f"{out} was started with other data: the texts or labels of data.source have changed; use another --out")
    assert roster.rows is not None
    return before.rows or roster.rows
