"""What every benchmark shares: the machine, its matrix peak, interleaved repetitions, a table, a JSON file of results.

Only ratios within one run mean anything on a shared machine, so the sides of a comparison take turns, in an order that turns round
from one repetition to the next, and the matrix peak is measured once in every repetition.
"""

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear

from fedlora.errors import BadInput

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("fedlora", "torch", "transformers", "peft", "numpy", "flwr", "ray")
ROWS = {"cpu": (1024, 4096), "cuda": (8192, 16384)}  # of the activations in the products that find the peak
SIDES = {"cpu": ((384, 384), (384, 1536)), "cuda": ((768, 3072), (4096, 4096), (8192, 8192))}  # of their weights
PEAK_S = 0.1  # for each product
INSTRUCTIONS = {"amx": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512f", "avx2": "avx2"}  # the best first -> its flag
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Row = dict[str, Any]
console = Console(width=None if Console().is_terminal else 140)


@dataclass(frozen=True)
class Sample:
    """One repetition of one side. `tokens` are real ones, without padding; a side that trains an example twice counts it twice.
    `peak`: the most GB that its process has held, where it has one of its own."""

    seconds: float
    examples: int
    tokens: int
    peak: float | None = None


Side = Callable[[], Sample]


# ---- the machine -------------------------------------------------------------------------------------------------------------


def machine() -> Row:
    """What the numbers depend on besides the versions."""
    found: Row = {"cpu": _cpu("model name"), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"instructions": instructions(_cpu("flags")), "os": platform.platform(terse=True)}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def instructions(flags: str) -> str:
    """The best matrix instructions among a processor's flags: they set its peak, and its name alone does not tell them."""
    return next((name for name, flag in INSTRUCTIONS.items() if flag in flags.split()), platform.machine())


def kind(machine: Mapping[str, Any]) -> str:
    """Of a machine (see `machine`): processor, cores, best matrix instructions, GPU. Results of one kind lie together."""
    words = " ".join(str(machine[key]) for key in ("cpu", "cores", "instructions", "gpu") if key in machine)
    return re.sub(r"[^a-z0-9_]+", "-", re.sub(r"\((r|tm)\)", "", words.lower())).strip("-")


def about(machine: Mapping[str, Any]) -> str:
    """What numbers of this machine can be held against, in a line."""
    with_bf16 = "bf16" in INSTRUCTIONS.get(machine["instructions"], "")
    arithmetic = "multiplies in bf16, as the targets have it" if with_bf16 else "has no bf16 units, which the targets are for: fp32"
    return f"this machine: {kind(machine)}, which {arithmetic}; results of other kinds stay as they are"


def _cpu(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak(device: str = "cpu") -> dict[str, float]:
    """FLOP/s of the fastest matrix product (n, d_in) x (d_in, d_out) over shapes like a transformer's, in bf16 and in fp32 (on a
    GPU as torch computes it by default, without tf32): the median of some repetitions, the best of the shapes."""
    best = {name: 0.0 for name in DTYPES}
    for name, dtype in DTYPES.items():
        for rows in ROWS[device]:
            for d_in, d_out in SIDES[device]:
                x = torch.randn(rows, d_in, device=device).to(dtype)
                weight = torch.randn(d_out, d_in, device=device).to(dtype)
                linear(x, weight)
                seconds = statistics.median(_repeated(partial(linear, x, weight), device))
                best[name] = max(best[name], 2.0 * rows * d_in * d_out / seconds)
    return best


def _repeated(run: Callable[[], Any], device: str) -> list[float]:
    times = [_timed(run, device)]
    while sum(times) < PEAK_S:
        times.append(_timed(run, device))
    return times


def _timed(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- comparing ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Samples of each side, and the matrix peak of each repetition by dtype (see `peak`)."""

    samples: Mapping[str, Sequence[Sample]]
    peaks: Sequence[Mapping[str, float]]

    @property
    def peak(self) -> dict[str, float]:
        return {name: statistics.median(p[name] for p in self.peaks) for name in DTYPES}


def interleave(sides: Mapping[str, Side], repetitions: int, device: str = "cpu") -> Measured:
    """Every side in turn, `repetitions` times, the order reversed each time."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    peaks = []
    for repetition in range(repetitions):
        peaks.append(peak(device))
        for name in list(sides)[:: -1 if repetition % 2 else 1]:
            with console.status(f"repetition {repetition + 1} of {repetitions}: {name}"):
                samples[name].append(sides[name]())
    return Measured(samples, peaks)


def speeds(measured: Measured, weights: int, targets: Mapping[str, float]) -> list[Row]:
    """A row a side; the first side is ours. A LoRA step costs at least 4 FLOP for each frozen weight and real token: the forward
    product and the gradient to its input. The share of the peak is that cost over what the faster dtype
    could have done in the time.

    Args:
        weights: frozen weights in the adapted layers.
        targets: side -> how many times faster ours is to be.
    """
    ours = next(iter(measured.samples.values()))
    rows = []
    for name, own in measured.samples.items():
        ratios = [_rate(a) / _rate(b) for a, b in zip(ours, own, strict=True)]
        useful = statistics.median(4.0 * weights * s.tokens / s.seconds for s in own)
        row: Row = {
            "side": name,
            "examples/s": statistics.median(map(_rate, own)),
            "tokens/s": statistics.median(s.tokens / s.seconds for s in own),
            "share of peak": useful / max(measured.peak.values()),
        }
        if any(s.peak for s in own):
            row["peak, GB"] = max(s.peak or 0.0 for s in own)
        if own is not ours:
            row |= {"ours is faster by": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            row |= {"target": targets[name]} if name in targets else {}
        rows.append(row | {"seconds": [s.seconds for s in own], "examples": [s.examples for s in own]})
    return rows


def _rate(sample: Sample) -> float:
    return sample.examples / sample.seconds


# ---- results -----------------------------------------------------------------------------------------------------------------


def save(name: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], results: Path = RESULTS) -> Path:
    """Write KIND/NAME.json: the rows, what was run, on what kind of machine, with which versions, when. Returns its path."""
    folder = results / kind(machine())
    whole = {
        "benchmark": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(),
        "facts": dict(facts),
        "rows": [dict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(whole, indent=1, default=float) + "\n")
    return file


def rows(name: str, results: Path = RESULTS) -> list[Row]:
    """The rows of NAME.json of this kind of machine; none where there is no such file."""
    file = results / kind(machine()) / f"{name}.json"
    return list(json.loads(file.read_text())["rows"]) if file.exists() else []


def show(title: str, rows: Sequence[Mapping[str, Any]], hidden: Iterable[str] = ("seconds", "examples", "pairs", "config")) -> None:
    """Print the rows as a table, with every column that any of them has but the hidden ones."""
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c not in set(hidden)]
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(_cell(column, row.get(column)) for column in columns))
    console.print(table)


def _cell(column: str, x: Any) -> str:
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:.1%}" if column.startswith("share") else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return str(x)


def finish(name: str, title: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], quick: bool) -> None:
    """Show the rows; write them, too, unless this was a quick look, whose numbers mean nothing."""
    show(title, rows)
    for what, value in facts.items():
        if what != "config":
            console.print(f"  {what}: {value}", soft_wrap=True, highlight=False)
    console.print("  quick: the numbers mean nothing and are not kept" if quick else f"  written to {save(name, rows, facts)}")


def command(main: Callable[..., None]) -> None:
    """Run a benchmark's `main` with the options of the command line. Bad input, such as data that is not there, is one line and
    exit status 2."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    try:
        app()
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
