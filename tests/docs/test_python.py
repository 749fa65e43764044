"""The page on Python, the examples and the notebook run as they stand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import side

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"
TRL = ROOT / "examples" / "trl_client.py"  # run where trl is: tests/training/test_trl.py
SCRIPTS = sorted(set((ROOT / "examples").glob("*.py")) - {TRL})
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
LIMIT = 40  # lines of a method


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def cells() -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_everything_compiles_and_the_notebook_has_no_output() -> None:
    for name, text in (
        (PAGE, "\n".join(blocks())),
        (NOTEBOOK, "\n".join(cells())),
        *((file, file.read_text()) for file in (*SCRIPTS, TRL)),
    ):
        compile(text, str(name), "exec")
    assert len(blocks()) >= 7 and len(SCRIPTS) == 3
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])


def test_a_method_of_your_own_takes_forty_lines() -> None:
    text = (ROOT / "examples" / "own_method.py").read_text()
    method = text[text.index("@dataclass(frozen=True)\nclass Momentum") : text.index("if __name__")]
    assert sum(bool(line.strip()) for line in method.splitlines()) <= LIMIT


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks()))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean lora-a2" in done.stdout and "True" in done.stdout.splitlines()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() and (tmp_path / "run.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_notebook_ends_with_an_adapter(tmp_path: Path) -> None:
    python = side.python("notebook", ["nbclient", "nbformat", "ipykernel", "pandas", "polars"])
    environment = side.environment()
    code = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(book, timeout=300, kernel_name="python3").execute()
shown = [output["data"] for cell in book.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
assert any("<svg" in data.get("text/html", "") for data in shown), shown
assert any("PeftModel" in data.get("text/plain", "") for data in shown), shown
import polars, pandas, pyarrow
from fedlora.data.given import table
rows = {"text": ["a", "b"], "label": [1, 0]}
assert table(polars.DataFrame(rows), "p").to_pydict() == rows
assert table(pandas.DataFrame(rows), "p").to_pydict() == rows
"""
    done = subprocess.run([python, "-c", code, NOTEBOOK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
