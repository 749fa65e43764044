"""The runs that workers elsewhere are compared with."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from cluster import configured, run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two data sets."""
    folder = tmp_path_factory.mktemp("workers")
    tiny.save_model("bert", folder / "bert")
    (folder / "data").mkdir()
    tiny.save_data(folder / "data", 60, 30)
    texts, labels = tiny.examples(50, 3)
    with open(folder / "other.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, [f"other {label}" for label in labels], strict=True)])
    return folder


@pytest.fixture(scope="session")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a method with all clients in the server's process."""
    done: dict[str, Path] = {}

    def played(name: str) -> Path:
        if name not in done:
            done[name] = run(configured(world, name), tmp_path_factory.mktemp("alone") / name)
        return done[name]

    return played
