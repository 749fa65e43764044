"""Environments beside `.venv`, for packages that tests need and that our own environment had better not have."""

import os
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import fedlora

ROOT = Path(__file__).parents[1]


def extra(*names: str) -> list[str]:
    """What extras of the package ask for."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [requirement for name in names for requirement in extras[name]]


def python(name: str, packages: Sequence[str]) -> Path:
    """Python of `.venv-NAME`, which has what `.venv` has, and these packages on top. It is made where it is not there, and again
    installed into where it was made for others."""
    done = subprocess.run([ROOT / "scripts" / "beside", name, *packages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ROOT / f".venv-{name}" / "bin" / "python"


def passes(python: Path, file: Path) -> None:
    """All cases of a file pass there."""
    command = [python, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", file.name]
    around = environment(file.parent, ROOT / "tests")
    done = subprocess.run(command, cwd=file.parent, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


def environment(*folders: Path) -> dict[str, str]:
    """Of a process there, which then imports the package that is tested, and what is in these folders."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(fedlora.__file__).parents[1], *folders)))}
