"""The page is whole in one file, says its answer first, and is readable for people and for screen readers."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.report import html
from fedlora.report.contenders import contenders
from fedlora.report.runs import Comparison, comparison, read
from fedlora.report.summary import answer_table, lead, results

Write = Callable[..., Path]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements with their attributes and text; fails on what is closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []  # innermost element, text
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data.replace("\u00a0", " ")))  # a number keeps its unit

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [words for name, words in self.words if name == tag and words.strip()]


def run(method: str, alpha: float, seed: int = 0) -> dict[str, Any]:
    return {"method": {"name": method}, "data": {"alpha": alpha}, "seed": seed}


@pytest.fixture
def everything(write: Write, tmp_path: Path) -> Comparison:
    """Two methods over two seeds, with all that a run can record."""
    rng = np.random.default_rng(0)
    runs = []
    for i, (method, seed) in enumerate((m, s) for m in ("lora-a2", "fedit") for s in (0, 1)):
        chosen = rng.random((2, 6, 4)) < 0.3
        arrays = {"similarity": np.eye(2, dtype=np.float32), "similarity_clients": np.arange(2)}
        arrays["confusion"] = np.array([[3, 1], [0, 4]])
        arrays |= {"ranks_chosen": chosen, "ranks_chosen_clients": np.arange(2)} if method == "lora-a2" else {}
        row = {"discordance": 0.1 * i, "energy": [0.8, 0.2], "client_accuracy": {str(k): 0.1 * k for k in range(2)}}
        row |= {"failures": {"1": "timed out & <gone>"}, "commonest_accuracy": 0.05}
        accuracy = [0.1 + 0.01 * i, 0.2 + 0.03 * i]
        runs.append(read(write(tmp_path / str(i), run(method, 0.5, seed), accuracy, 10**6, [row, row], {2: arrays}, clients=2)))
    published = [{"method.name": "fedit", "data.alpha": 0.5, "accuracy": 61.75}]
    return comparison(runs, "Title & <more>", "About it.", published, [("flexlora, Dir(0.5)", "out of memory")], "small")


@pytest.fixture
def page(everything: Comparison, tmp_path: Path) -> Page:
    html.write(html.of_comparison(everything), tmp_path / "out" / "report.html", tmp_path / "out" / "figures")
    return Page((tmp_path / "out" / "report.html").read_text())


def test_everything_at_once(page: Page, tmp_path: Path) -> None:
    """One page is made and many things are held to be true of it, for drawing takes its time."""
    text = (tmp_path / "out" / "report.html").read_text()
    structure(page)
    self_contained(page, text)
    accessible(page)
    contents(page, text)
    figures(tmp_path / "out" / "figures")


def structure(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert page.text("h1") == ["Title & <more>"]
    assert page.text("title") == ["Title & <more>"]
    ids = [str(attrs["id"]) for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [str(attrs["href"]) for attrs in page.all("a")]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)


def self_contained(page: Page, text: str) -> None:
    assert "http" not in text
    assert "//" not in text.replace("base64,", "").split("</style>")[0]
    assert not page.all("script") + page.all("link") + page.all("iframe")
    for tag, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert str(attrs.get(name, "#")).startswith(("#", "data:image/png;base64,")), (tag, attrs)


def accessible(page: Page) -> None:
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in page.all("svg"))
    tables = page.all("table")
    assert len(page.all("caption")) == len(tables) > 10
    assert all(attrs["scope"] in {"col", "row"} for attrs in page.all("th"))
    assert sum(attrs["scope"] == "row" for attrs in page.all("th")) >= len(tables)
    assert len(page.all("figure")) == len(page.all("figcaption"))


def contents(page: Page, text: str) -> None:
    lead = "Most accurate: FedIT with 27.5 ± 2.1 %, then LoRA-A² with 21.5 ± 2.1 %."
    assert any(words.startswith(lead) for words in page.text("p"))
    assert page.text("h2") == [
        "Results",
        "Clients that failed",
        "Accuracy by round and by upload",
        "All metrics by round",
        "Ours beside the published numbers",
        "Class by class",
        "Fairness over clients",
        "What averaging the factors apart loses",
        "How many of its ranks a model uses",
        "Ranks chosen by module",
        "Similarity of clients",
        "Where the time went",
        "The split",
        "Settings",
        "Runs that failed",
    ]
    assert "1 of 5 runs failed: flexlora, Dir(0.5)." in " ".join(words.strip() for _, words in page.words)
    assert text.index("frontier") < text.index("<h2>Results")  # the answer comes first
    numbers = page.text("td")
    assert "27.5 ± 2.1" in numbers
    assert "−34.2" in numbers  # ours 27.5 against 61.75
    assert any("out of memory" in words for _, words in page.words)
    assert numbers.count("timed out & <gone>") == 2  # of each method
    assert page.text("th").count("always the commonest class") == 1
    assert text.index("Why</a>") < text.index('class="lead"') < text.index("out of memory")
    assert "sample standard deviation over 2 seeds" in text


def figures(folder: Path) -> None:
    names = {file.stem for file in folder.iterdir()}
    assert names == {
        "frontier",
        "accuracy-by-round",
        "accuracy-by-upload",
        "metrics-by-round",
        "published",
        "clients",
        "confusion",
        "discordance",
        "energy",
        "ranks-by-round",
        "ranks-by-client",
        "similarity",
        "ranks-in-common",
        "time",
    }
    assert {file.name for file in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


def test_the_answer_is_that_of_the_hardest_place(write: Write, tmp_path: Path) -> None:
    values = {("lora-a2", 0.5): 0.8, ("fedit", 0.5): 0.9, ("lora-a2", 0.01): 0.7, ("fedit", 0.01): 0.2}
    runs = [read(write(tmp_path / f"{m}{a}", run(m, a), [x, x], 1_500_000)) for (m, a), x in values.items()]
    found = contenders(comparison(runs))
    assert lead(found) == (
        "Most accurate at Dir(0.01): LoRA-A² with 70.0 %, then FedIT with 20.0 %. "
        "Fewest bytes to reach 66 %: LoRA-A² with 1.5 MB uploaded; no other method gets there."
    )
    table = answer_table(found)
    assert table is not None
    assert table.rows == (
        ("Dir(0.5)", "FedIT", "90.0 %", "85 %", "FedIT", "1.5 MB"),
        ("Dir(0.01)", "LoRA-A²", "70.0 %", "66 %", "LoRA-A²", "1.5 MB"),
    )
    assert [row[:3] for row in results(found)[0].rows] == [("LoRA-A²", "80.0", "70.0"), ("FedIT", "90.0", "20.0")]


def test_a_single_run(write: Write, tmp_path: Path) -> None:
    one = read(write(tmp_path / "run", run("lora-a2", 0.5), [0.25, 0.5], 2_000_000))
    html.write(html.of_comparison(comparison([one])), tmp_path / "report.html", tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.text("h1") == ["LoRA-A² on 20newsgroups Dir(0.5)"]
    assert page.text("p")[0] == "LoRA-A² reaches 50.0 % after 2 rounds and 4 MB of uploads."
    assert any(words.startswith("seed = 0") for words in page.text("code"))
    assert (tmp_path / "accuracy-by-round.png").exists()
    assert "frontier" not in text
    assert "torch 2.8.0; cpu in float32" in text


def test_what_is_missing_is_left_out(write: Write, tmp_path: Path) -> None:
    """A run in its first round, not scored yet, without a picture of its split; nothing else says anything."""
    folder = write(tmp_path / "run", {"train": {"rounds": 5}}, [None], extra=[{"train_s": None, "wall_s": None}])
    (folder / "split.png").unlink()
    html.write(html.of_comparison(comparison([read(folder)])), tmp_path / "report.html", tmp_path / "figures")
    page = Page((tmp_path / "report.html").read_text())
    assert "No round has been scored yet." in page.text("p")
    assert "not scored" in page.text("td")
    assert any("Not finished yet" in words for words in page.text("p"))
    assert "The split" not in page.text("h2")


def test_an_unfinished_cell_says_how_far_it_is(write: Write, tmp_path: Path) -> None:
    long = {"train": {"rounds": 9}}
    runs = [read(write(tmp_path / m, run(m, 0.5) | long, accuracy)) for m, accuracy in (("fedit", [0.5] * 9), ("lora-a2", [0.25]))]
    html.write(html.of_comparison(comparison(runs)), tmp_path / "report.html", tmp_path / "figures")
    numbers = Page((tmp_path / "report.html").read_text()).text("td")
    assert "25.0 (round 1)" in numbers
    assert "50.0" in numbers


def test_the_report_is_replaced_whole(write: Write, tmp_path: Path) -> None:
    one = comparison([read(write(tmp_path / "run", {}, [None]))])
    (tmp_path / "report.html").write_text("old")
    html.write(html.of_comparison(one), tmp_path / "report.html", tmp_path / "figures")
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(tmp_path.glob(".*.part"))
