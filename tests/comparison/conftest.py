"""A comparison that plays in a second: two methods on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w


@pytest.fixture(scope="session")
def tables(bert_folder: Path, csv_folder: Path) -> dict[str, Any]:
    return {
        "title": "Tiny",
        "precision": "fp32",
        "model": {"source": str(bert_folder)},
        "data": {"source": str(csv_folder), "alpha": 5.0, "max_length": 16, "limit": 40},
        "clients": {"count": 3, "rank": 2},
        "train": {"rounds": 2, "batch_size": 8, "lr": 5e-3},
        "method": [{"name": "lora-a2"}, {"name": "fedit"}],
    }


@pytest.fixture
def save(tmp_path: Path, tables: dict[str, Any]) -> Callable[..., str]:
    """Write the recipe with some tables replaced; its path."""

    def write(name: str = "tiny", **changes: Any) -> str:
        file = tmp_path / f"{name}.toml"
        file.write_text(tomli_w.dumps(tables | changes))
        return str(file)

    return write
