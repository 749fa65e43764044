"""An earlier version of the package beside the working tree, in turns: `--against COMMIT`.

Each version plays in a process of its own, which imports the package of that commit and these benchmarks, and plays on when it is
told to.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import environ, pathsep
from pathlib import Path
from typing import Any

from benchmarks.harness import Sample, Side
from fedlora.errors import BadInput, first_line

ROOT = Path(__file__).parents[1]
OURS = "fedlora"


@contextmanager
def source(commit: str) -> Iterator[Path]:
    """The package as a commit has it: the folder to import from. BadInput: there is no such commit."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        packed = Path(folder) / "src.tar"
        done = subprocess.run(["git", "archive", "--output", packed, commit, "src"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"--against {commit}: {first_line(done.stderr)}")
        subprocess.run(["tar", "-xf", packed, "-C", folder], check=True)
        yield Path(folder) / "src"


def environment(src: Path) -> dict[str, str]:
    """Of a process that imports the package from there."""
    return environ | {"PYTHONPATH": pathsep.join([str(src), str(ROOT)])}


@contextmanager
def versions(commit: str, tables: Mapping[str, Any], rounds: int = 1, passes: int = 1) -> Iterator[dict[str, Side]]:
    """The working tree and an earlier version as sides that play the same rounds; see `ours.side`."""
    with (
        source(commit) as earlier,
        _side(ROOT / "src", tables, rounds, passes) as now,
        _side(earlier, tables, rounds, passes) as before,
    ):
        yield {OURS: now, f"{OURS} {commit}": before}


@contextmanager
def _side(src: Path, tables: Mapping[str, Any], rounds: int, passes: int) -> Iterator[Side]:
    command = [sys.executable, "-m", "benchmarks.against", json.dumps(tables), str(rounds), str(passes)]
    with subprocess.Popen(command, env=environment(src), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        asks, answers = child.stdin, child.stdout

        def run() -> Sample:
            print(file=asks, flush=True)
            line = answers.readline()
            if not line:
                raise RuntimeError(f"the version in {src} ended with status {child.wait()}")
            return Sample(*json.loads(line))

        try:
            run()  # warms up
            yield run
        finally:
            asks.close()


def main(tables: str, rounds: str, passes: str) -> None:
    """Play on for each line of standard input."""
    from benchmarks import ours

    out, sys.stdout = sys.stdout, sys.stderr  # nothing but samples goes to who asks
    context = ours.context(json.loads(tables), {"train": {"rounds": 1_000_000}})
    side = ours.side(context, int(rounds), int(passes))
    for _ in sys.stdin:
        sample = side()
        print(json.dumps([sample.seconds, sample.examples, sample.tokens]), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
