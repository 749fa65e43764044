"""The numbers that the benchmarks print, by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import accuracy, harness, ours, overhead
from benchmarks.__main__ import main
from benchmarks.bf16 import Widened
from benchmarks.harness import Measured, Sample

PEAK = {"bf16": 2000.0, "fp32": 1000.0}


def test_speeds() -> None:
    own, peer = [Sample(1.0, 10, 100), Sample(2.0, 10, 100)], [Sample(4.0, 10, 100), Sample(10.0, 10, 100)]
    first, second = harness.speeds(Measured({"ours": own, "peer": peer}, [PEAK]), weights=2, targets={"peer": 3.0})
    assert first["examples/s"] == 7.5 and first["tokens/s"] == 75.0
    assert first["share of peak"] == pytest.approx((800 / 2000 + 400 / 2000) / 2)  # 4 FLOP x 2 weights x 100 tokens = 800
    assert (second["ours is faster by"], second["least"], second["most"], second["target"]) == (4.5, 4.0, 5.0, 3.0)
    assert "ours is faster by" not in first


def test_sides_take_turns_in_turned_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "peak", lambda device: PEAK)
    played: list[str] = []

    def side(name: str) -> Any:
        def run() -> Sample:
            played.append(name)
            return Sample(1.0, 1, 1)

        return run

    measured = harness.interleave({name: side(name) for name in "abc"}, 3)
    assert "".join(played) == "abc" + "cba" + "abc"
    assert {name: len(samples) for name, samples in measured.samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_peak_is_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_repeated", lambda run, device: [0.5, 1.0, 5.0])
    assert harness.peak("cpu")["fp32"] == 2.0 * 4096 * 384 * 1536  # the largest product in the median second


def test_results_are_whole(tmp_path: Path) -> None:
    file = harness.save("some", [{"side": "a", "x": 1.5}], {"limit": 3}, tmp_path)
    read = json.loads(file.read_text())
    assert (
        file == tmp_path / harness.kind(harness.machine()) / "some.json"
        and read["rows"] == [{"side": "a", "x": 1.5}]
        and read["facts"] == {"limit": 3}
    )
    assert {"cpu", "cores", "threads"} <= set(read["machine"]) and "torch" in read["versions"] and read["date"].endswith("UTC")


def test_machines_are_told_apart_by_what_sets_their_peak() -> None:
    assert harness.instructions("fpu avx avx2 fma") == "avx2"
    assert harness.instructions("avx2 avx512f avx512bw") == "avx512"
    assert harness.instructions("avx2 avx512f avx512_bf16") == "avx512_bf16"
    assert harness.instructions("avx2 avx512f avx512_bf16 amx_bf16 amx_tile") == "amx"
    machine = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 16, "threads": 8, "instructions": "amx", "os": "Linux"}
    assert harness.kind(machine) == "intel-xeon-processor-16-amx"
    assert harness.kind(machine | {"gpu": "NVIDIA H100 80GB HBM3"}) == "intel-xeon-processor-16-amx-nvidia-h100-80gb-hbm3"


def test_a_quick_look_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "save", lambda *x: pytest.fail("wrote results"))
    harness.finish("some", "title", [{"side": "a"}], {}, quick=True)


def comparison(config: Mapping[str, Any], seeds: int = 3) -> accuracy.Comparison:
    return accuracy.Comparison("x", lambda seed: pytest.fail("played"), seeds, 0.5, config)


def test_paired_difference() -> None:
    row = accuracy.paired(comparison({}), {0: (0.52, 0.50), 2: (0.51, 0.50), 1: (0.50, 0.50)})
    assert row["difference, points"] == pytest.approx(1.0)
    # Differences 2, 0, 1: standard error 1 / sqrt 3; t of 2 degrees of freedom at 97.5 % is 4.302653.
    assert row["95 % from"] == pytest.approx(1 - 4.302653 / 3**0.5, abs=1e-5)
    assert row["to"] == pytest.approx(1 + 4.302653 / 3**0.5, abs=1e-5)
    assert "to" not in accuracy.paired(comparison({}), {0: (0.5, 0.5)})


def test_pairs_of_the_same_configuration_are_not_repeated(tmp_path: Path) -> None:
    one = comparison({"seed": 0, "sizes": (1, 2)})
    pairs = {0: (0.52, 0.50), 1: (0.1, 0.2)}
    assert accuracy.known(one, harness.rows("some", tmp_path)) == {}
    harness.save("some", [accuracy.paired(one, pairs)], {}, tmp_path)
    rows = harness.rows("some", tmp_path)
    assert accuracy.known(one, rows) == pairs and accuracy.known(comparison({"seed": 1}), rows) == {}
    done = {"x": dict(pairs)}
    accuracy.play([comparison({}, seeds=2)], done, 1, lambda: pytest.fail("nothing was to be done"))
    assert done == {"x": pairs}


def test_bf16_products_are_rounded_once() -> None:
    """Against the product in float64, rounded to bf16: apart by the last bit at most, where the fp32 sum lay next to the middle."""
    random = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=random).bfloat16() for shape in ((30, 200), (200, 40), (30, 40)))
    layer = torch.nn.Linear(200, 40).bfloat16()
    with Widened():  # type: ignore[no-untyped-call]
        got = {"mm": a @ b, "addmm": torch.addmm(c, a, b), "linear": layer(a), "in place": c.clone().addmm_(a, b)}
        batched = torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))
        layer(a).sum().backward()
    product = a.double() @ b.double()
    bias = layer.bias.detach().double() + a.double() @ layer.weight.detach().double().T
    want = {"mm": product, "addmm": c.double() + product, "linear": bias, "in place": c.double() + product}
    for name, x in {**got, "bmm": batched[1]}.items():
        exact = want.get(name, product)
        assert x.dtype == torch.bfloat16
        assert (x.double() - exact).abs().le(2.0**-8 * exact.abs() * (1 + 1e-3) + 1e-5).all(), name
        assert (x == exact.bfloat16()).double().mean() > 0.99, name
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16
    summed = a.double().sum(0).expand(40, -1)
    assert (layer.weight.grad.double() - summed).abs().le(2.0**-8 * summed.abs() + 1e-5).all()
    with Widened():  # type: ignore[no-untyped-call]
        assert torch.equal(a.float() @ b.float(), a.float() @ b.float())


def test_the_clock_of_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def train(jobs: list[float]) -> Any:
        for job in jobs:
            now[0] += job
            yield job

    monkeypatch.setattr(ours.time, "perf_counter", lambda: now[0])
    clock = ours.Clocked(SimpleNamespace(train=train, pad=7))  # type: ignore[arg-type]
    for _ in clock.train([1.0, 2.0]):
        now[0] += 100.0  # what others do between two outcomes
    assert clock.seconds == 3.0 and clock.pad == 7


def test_overhead_of_a_tiny_federation(bert_folder: Path, csv_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "POOL", 5)
    tables = {
        "model": {"source": str(bert_folder)},
        "data": {"source": str(csv_folder), "partition": "iid"},
        "clients": {"count": 5},
    }
    population = overhead.Population(clients=12, sample=3, rounds=2)
    context = overhead.populated(ours.context(tables), population, each=4)
    assert len(context.setup.clients) == 12 and {len(data) for data in context.train.values()} == {4}
    row = overhead.fedlora(context, population)
    assert len(row["seconds"]) == 2 and 0 < row["share outside training"] < 1
    assert row["training, s"] < row["round, s"]


def test_unknown_benchmark() -> None:
    import typer

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["train-shrt"])
    assert result.exit_code == 2 and "train-short" in result.output
