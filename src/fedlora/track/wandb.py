"""Weights & Biases: offline in RUN/track/wandb, to be sent by `wandb sync` when one likes, or online while the run goes on.

It is online where track.mode says so; where that is not set, as WANDB_MODE says, and without that, where WANDB_API_KEY is set.
A resumed run keeps its id: online it goes on, offline it leaves another folder of the same id.
"""

import os
import sys
from secrets import token_hex
from typing import Any

from fedlora.config import as_tables
from fedlora.track.base import Kept, Point, Run

PATIENCE = 10  # seconds for a server that does not answer; wandb's own are minutes


class WeightsAndBiases:
    """Sends rows of a wandb run's history."""

    run: Any

    def start(self, run: Run, first: int, kept: Kept) -> Kept:
        import wandb

        id = kept.get("id") or token_hex(8)
        mode = run.config.track.mode or os.environ.get("WANDB_MODE") or ("online" if "WANDB_API_KEY" in os.environ else "offline")
        quiet = {"silent": True, "console": "off", "x_disable_stats": True, "disable_git": True, "disable_code": True}
        hooks = sys.exit, sys.excepthook
        try:
            wandb.setup(wandb.Settings(**quiet))  # quiet from here on: init would print that it has found a key
        finally:
            sys.exit, sys.excepthook = hooks  # it had put its own there
        self.run = wandb.init(
            project=run.config.track.project,
            name=run.name,
            id=id,
            dir=str(run.place),
            config=as_tables(run.config),
            mode=mode,
            resume="allow" if kept and mode == "online" else None,
            reinit="create_new",  # whatever else in this process uses wandb is left alone
            settings=wandb.Settings(**quiet, init_timeout=PATIENCE, finish_timeout=PATIENCE),
        )
        return {"id": id}

    def round(self, point: Point) -> None:
        self.run.log({**point.numbers, **point.texts}, step=point.step)

    def finish(self, point: Point) -> None:
        self.run.summary.update(point.numbers)

    def close(self) -> None:
        self.run.finish()


TRACKER = WeightsAndBiases
