"""python -m benchmarks [NAME]... [--quick]: run all benchmarks but `accuracy`, which takes hours, or those named."""

import subprocess
import sys
from typing import Annotated

import typer

from benchmarks import harness
from fedlora.errors import unknown

ALL = ("train-short", "train-long", "lora-a2-round", "server", "overhead", "memory", "lm", "federation", "ray", "gpu", "gpu-lm")
NAMED_ONLY = ("accuracy",)
AGAINST = ("train-short", "train-long", "lora-a2-round", "lm")


def main(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join((*ALL, *NAMED_ONLY)))] = None,
    quick: Annotated[bool, typer.Option(help="A smoke run of tiny sizes; writes nothing.")] = False,
    against: Annotated[str, typer.Option(metavar="COMMIT", help=f"An earlier version beside ours: {', '.join(AGAINST)}.")] = "",
) -> None:
    """Run benchmarks, each in a process of its own, and write benchmarks/results/KIND/NAME.json, where KIND is of this machine."""
    chosen = names or list(AGAINST if against else ALL)
    for name in chosen:
        if name not in (*ALL, *NAMED_ONLY):
            raise typer.BadParameter(str(unknown("benchmark", name, (*ALL, *NAMED_ONLY))))
    typer.echo(harness.about(harness.machine()))
    if against and (others := [name for name in chosen if name not in AGAINST]):
        raise typer.BadParameter(f"--against is of {', '.join(AGAINST)}, not of {', '.join(others)}")
    options = (["--quick"] if quick else []) + (["--against", against] if against else [])
    failed = [name for name in chosen if _run(name, options)]
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _run(name: str, options: list[str]) -> int:
    module = f"benchmarks.{name.replace('-', '_')}"
    return subprocess.run([sys.executable, "-m", module, *options]).returncode


if __name__ == "__main__":
    typer.run(main)
