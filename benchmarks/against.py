"""Our side in a process of its own, so that its memory is known; and an earlier version of the package beside it, in turns:
`--against COMMIT`.

Each version's process imports the package of that commit and these benchmarks, and plays on when it is told to.
"""

import json
import resource
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
        version(tables, rounds, passes) as now,
        version(tables, rounds, passes, earlier) as before,
    ):
        yield {OURS: now, f"{OURS} {commit}": before}


@contextmanager
def version(tables: Mapping[str, Any], rounds: int = 1, passes: int = 1, src: Path = ROOT / "src") -> Iterator[Side]:
    """A side that plays the rounds with the package in `src`; see `ours.side`."""
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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps([sample.seconds, sample.examples, sample.tokens, peak]), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
