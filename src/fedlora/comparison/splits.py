"""A recipe without runs: the statistics of a split over many seeds, and published ones held against them.

    [splits]
    source = "banking77"      # a data set, as data.source
    alpha = [0.01, 0.1]       # Dirichlet's
    clients = 30
    seeds = 1000              # so many splits, seeds 0, 1, ...
    [[splits.published]]      # optional: one split that somebody published
    alpha = 0.01
    train = { max_examples = 639, min_examples = 50, max_classes = 15, min_classes = 2 }
    test = { ... }

leaves OUT/results.parquet (a row for each alpha, part and statistic), results.md, report.html and figures/.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config import Config, resolve
from fedlora.data.bands import PARTS, STATISTICS, Band, over_seeds
from fedlora.data.dataset import Dataset
from fedlora.data.load import load
from fedlora.disk import write_whole
from fedlora.errors import BadInput, unknown
from fedlora.report.html import Page, Section, write
from fedlora.report.picture import Picture, Table
from fedlora.runs.prepare import make_task
from fedlora.settings import build

WORDS = {
    "max_examples": "most examples of a client",
    "min_examples": "fewest examples of a client",
    "max_classes": "most classes of a client",
    "min_classes": "fewest classes of a client",
}


@dataclass(frozen=True)
class Published:
    """One split: its statistics by name, of either part."""

    alpha: float
    train: dict[str, int] = field(default_factory=dict)
    test: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Splits:
    """The table [splits] of a recipe."""

    source: str
    alpha: list[float]
    clients: int = 30
    seeds: int = 1000
    published: list[Published] = field(default_factory=list)

    def config(self, alpha: float) -> Config:
        """Of a run on such a split."""
        return resolve({"data": {"source": self.source, "alpha": alpha}, "clients": {"count": self.clients}})


def read(table: Mapping[str, Any]) -> Splits:
    """The table [splits] of a recipe. BadInput names what in it cannot be."""
    asked: Splits = build(Splits, table, "recipe key", "splits.")
    if not asked.alpha or min(asked.alpha) <= 0:
        raise BadInput(f"splits.alpha = {asked.alpha}: a list of positive numbers, at least one")
    for key, value in (("clients", asked.clients), ("seeds", asked.seeds)):
        if value < 1:
            raise BadInput(f"splits.{key} = {value}: at least 1")
    for each in asked.published:
        if each.alpha not in asked.alpha:
            raise BadInput(f"splits.published: alpha = {each.alpha:g} is not in splits.alpha")
        for name in (*each.train, *each.test):
            if name not in STATISTICS:
                raise unknown("published statistic", name, STATISTICS)
    return asked


@dataclass(frozen=True)
class Measurement:
    """One statistic of one part at one alpha: what it was in every split, and what was published."""

    alpha: float
    part: str
    statistic: str
    band: Band
    published: int | None = None

    @property
    def inside(self) -> bool | None:
        return None if self.published is None else self.published in self.band


def run(
    table: Mapping[str, Any],
    name: str,
    out: Path,
    scale: str = "",
    title: str = "",
    about: str = "",
    tell: Callable[[str], None] = print,
) -> None:
    """Deal the data with every seed and write the results into `out`; what is there already is replaced.

    Args:
        table: [splits] of a recipe.
        name: of the recipe.
        tell: hears a line for each alpha.

    Raises:
        BadInput: the table asks for what cannot be, or the data cannot be read or dealt; nothing has been written yet.
    """
    from fedlora.comparison.split_pictures import bands, dealt

    asked = read(table)
    first = asked.config(asked.alpha[0])
    dataset = load(make_task(first), first.data, seed=0)
    lines: list[Measurement] = []
    for alpha in asked.alpha:
        tell(f"{dataset.name}, Dirichlet({alpha:g}): {asked.seeds:,} splits among {asked.clients} clients")
        lines += measure(asked, alpha, dataset)
    pictures = dealt(dataset, [(alpha, asked.config(alpha)) for alpha in asked.alpha]), bands(dataset.name, lines)
    command = f"fedlora compare {name}" + (f" --scale {scale}" if scale else "")
    out.mkdir(parents=True, exist_ok=True)
    _write_parquet(asked, lines, out / "results.parquet")
    text = markdown(asked, dataset, lines, title or name, about)
    write_whole(out / "results.md", f"{text}\nMade by `{command}`.\n".encode())
    write(page(asked, dataset, lines, pictures, title or name, about, command), out / "report.html", out / "figures")


def measure(asked: Splits, alpha: float, dataset: Dataset) -> list[Measurement]:
    """Every statistic at one alpha."""
    config = asked.config(alpha)
    found = over_seeds(dataset, config.data, config.clients, range(asked.seeds))
    known = {"train": {}, "test": {}} | {
        part: getattr(each, part) for each in asked.published if each.alpha == alpha for part in PARTS
    }
    return [Measurement(alpha, part, name, Band(values), known[part].get(name)) for (part, name), values in found.items()]


def markdown(asked: Splits, dataset: Dataset, lines: Sequence[Measurement], title: str, about: str) -> str:
    """The results for people: the published tables' form, each number with our band, and the exceptions in words."""
    columns = [(alpha, part) for alpha in asked.alpha for part in PARTS]
    at = {(line.alpha, line.part, line.statistic): line for line in lines}
    told = [line for line in lines if line.published is not None]
    cell = "published number (our 95 % band); **bold** where it is outside" if told else "median (95 % band)"
    text = [
        f"# {title}",
        "",
        *([about, ""] if about else []),
        f"{dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test examples of {len(dataset.strata_names)} "
        f"classes, {asked.clients} clients, {asked.seeds:,} splits (seeds 0 to {asked.seeds - 1:,}). Each cell: {cell}.",
        "",
        "| | " + " | ".join(f"Dir({alpha:g}) {part}" for alpha, part in columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {WORDS[s]} | " + " | ".join(_cell(at[alpha, part, s]) for alpha, part in columns) + " |" for s in STATISTICS),
    ]
    if told:
        inside = sum(bool(line.inside) for line in told)
        text += ["", f"{inside} of {len(told)} published numbers lie in the band."]
        text += ["", *(f"- {exception(line)}" for line in told if not line.inside)] if inside < len(told) else []
    return "\n".join(text) + "\n"


def page(
    asked: Splits,
    dataset: Dataset,
    lines: Sequence[Measurement],
    pictures: tuple[Picture, Picture],
    title: str,
    about: str,
    command: str,
) -> Page:
    """The same as a page: `pictures` are those of a split and of the bands."""
    split, bands = pictures
    columns = [(alpha, part) for alpha in asked.alpha for part in PARTS]
    at = {(line.alpha, line.part, line.statistic): line for line in lines}
    told = [line for line in lines if line.published is not None]
    header = ("statistic", *(f"Dir({alpha:g}) {part}" for alpha, part in columns))
    rows = tuple((WORDS[s], *(_cell(at[alpha, part, s], "{:,}, outside") for alpha, part in columns)) for s in STATISTICS)
    caption = "Published number (our 95 % band)" if told else "Median (95 % band)"
    return Page(
        title=title,
        about=about,
        lead=f"{bands.finding}.",
        notes=[exception(line) for line in told if not line.inside],
        held=(
            ("data", f"{dataset.name}, {len(dataset.strata_names)} classes"),
            ("examples", f"{len(dataset.train):,} training, {len(dataset.test):,} test"),
            ("clients", f"{asked.clients}"),
            ("splits", f"{asked.seeds:,} of each alpha"),
        ),
        first=bands,
        results=(Table(caption, header, rows),),
        sections=(Section("split", "A split", (split,)),),
        made=f"Made by {command}.",
    )


def exception(line: Measurement) -> str:
    """One number outside its band, in words."""
    assert line.published is not None
    n = len(line.band.values)
    side, far = ("or less", "lower") if line.published < line.band.low else ("or more", "higher")
    how_many = line.band.as_far(line.published)
    return (
        f"Dir({line.alpha:g}) {line.part}, {WORDS[line.statistic]}: {line.published:,} is {far} than the band, "
        f"{line.band.low:,} to {line.band.high:,}; {how_many or 'none'} of {n:,} splits had {line.published:,} {side}."
    )


def _cell(line: Measurement, outside: str = "**{:,}**") -> str:
    band = f"{line.band.low:,} to {line.band.high:,}" if line.band.low < line.band.high else f"{line.band.low:,}"
    if line.published is None:
        return f"{line.band.median:,} ({band})"
    return f"{('{:,}' if line.inside else outside).format(line.published)} ({band})"


def _write_parquet(asked: Splits, lines: Sequence[Measurement], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "source": asked.source,
            "clients": asked.clients,
            "alpha": line.alpha,
            "part": line.part,
            "statistic": line.statistic,
            "splits": len(line.band.values),
            "low": line.band.low,
            "median": line.band.median,
            "high": line.band.high,
            "published": line.published,
            "inside": line.inside,
        }
        for line in lines
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    write_whole(path, sink.getvalue().to_pybytes())
