"""Personal methods on a tiny model: each client's own export, or one line that says why there is none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import Silent

from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.runs import play
from fedlora.runs.export import export, read_result
from fedlora.summary import read_rows


def execute(bert_folder: Path, csv_folder: Path, out: Path, **method) -> list[dict]:
    config = resolve(
        {
            "precision": "fp32",
            "model": {"source": str(bert_folder)},
            "data": {"source": str(csv_folder), "alpha": 1.0},
            "clients": {"count": 3, "rank": 2},
            "train": {"rounds": 2, "batch_size": 8, "lr": 5e-3},
            "method": method,
        },
        {},
    )
    play.execute(config, out, False, Silent())
    return read_rows(out)


@pytest.mark.parametrize("method", [{"name": "ce-lora"}, {"name": "fedsa-lora"}, {"name": "fedsa-lora", "variant": "vera"}])
def test_each_client_exports_its_own_adapter(method, bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    execute(bert_folder, csv_folder, tmp_path / "run", **method)
    exported = []
    for client in (None, 0, 1):
        assert export(tmp_path / "run", tmp_path / f"{client}", client, merged=False) == "adapter"
        exported.append(load_file(tmp_path / f"{client}" / "adapter_model.safetensors"))
    for name in (n for n in exported[0] if "lora_B" in n):
        assert not exported[0][name].any() or "vera" in method.values()
        assert exported[1][name].any() and not torch.equal(exported[1][name], exported[2][name])


def test_what_depends_on_the_input_says_so_and_what_all_share_is_exported(
    bert_folder: Path, csv_folder: Path, tmp_path: Path
) -> None:
    rows = execute(bert_folder, csv_folder, tmp_path / "run", name="feddpa")
    assert {row["failed"] for row in rows} == {0}
    with pytest.raises(BadInput, match="input") as error:
        export(tmp_path / "run", tmp_path / "own", 0, merged=False)
    assert "\n" not in str(error.value) and not (tmp_path / "own").exists()
    assert export(tmp_path / "run", tmp_path / "shared", None, merged=False) == "adapter"
    _, _, model, _ = read_result(tmp_path / "run", 0)
    assert model.gate.anchors.shape == (5, 16)


def test_a_client_that_has_nothing_to_say_sends_nothing(bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    first, second = execute(bert_folder, csv_folder, tmp_path / "run", name="feddpa", variant="f")
    assert first["upload_params"] > 0 and second["upload_params"] == 0 and second["failed"] == 0
    assert second["loss"] < first["loss"] and second["download_params"] == first["download_params"]


def test_mixtures_travel_once(bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    """Three clients, three classes or fewer each: 12 modules r^2, and c 3 (2 16 + 1) + c."""
    first, second = execute(bert_folder, csv_folder, tmp_path / "run", name="ce-lora")
    assert second["upload_params"] == 3 * 12 * 4 == second["download_params"]
    classes, rest = divmod(first["upload_params"] - 3 * 12 * 4, 3 * 33 + 1)
    assert rest == 0 and 3 < classes <= 9
    arrays = load_file(tmp_path / "run" / "arrays" / "round-00002.safetensors")
    assert arrays["mixing"].sum(dim=1).tolist() == pytest.approx([1.0] * 3)
    assert arrays["similarity"].diagonal().tolist() == pytest.approx([1.0] * 3)  # of updates, as in every other run


def test_what_a_client_learned_is_the_adapter_that_trained_and_not_the_one_that_it_received(
    bert_folder: Path, csv_folder: Path, tmp_path: Path
) -> None:
    """In round 2 FedDPA's global adapter trains first; the local one then trains beside the one that was received."""
    rows = execute(bert_folder, csv_folder, tmp_path / "run", name="feddpa")
    similarity = load_file(tmp_path / "run" / "arrays" / "round-00002.safetensors")["similarity"]
    assert similarity.diagonal().tolist() == pytest.approx([1.0] * 3) and bool((similarity != 0).all())
    assert all(0 < row["discordance"] < 1 for row in rows)
