"""Federations over Flower, in an environment beside `.venv` that has it."""

import subprocess
from pathlib import Path

import pytest
import side

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def python() -> Path:
    return side.python("flower", side.extra("flower"))


def test_federations_over_a_grid(python: Path) -> None:
    """The cases of `over_grid.py`."""
    command = [python, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", "over_grid.py"]
    done = subprocess.run(command, cwd=HERE, env=side.environment(HERE, side.ROOT / "tests"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
