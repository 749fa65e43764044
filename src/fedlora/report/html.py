"""The HTML report: one file that needs nothing else, with its pictures as files beside it."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.config import to_toml
from fedlora.report import summary, words
from fedlora.report.contenders import Contender, by_metric, by_place, contenders, dealt_by, place_of, title
from fedlora.report.picture import Picture, Table, inline, label, save
from fedlora.report.plots import (
    ablation,
    classes,
    clients,
    clock,
    discordance,
    energy,
    frontier,
    metrics,
    published,
    ranks,
    score,
    similarity,
)
from fedlora.report.runs import Comparison
from fedlora.report.units import LOSS
from fedlora.tasks.metrics import Metric

MOST_SPLITS = 4
PAGE = 73.0  # rem between the margins of the page at its widest


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    id: str
    heading: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Photo:
    """A finished picture of a run folder."""

    caption: str
    alt: str
    data: str  # base64 PNG
    table: Table


@dataclass(frozen=True)
class Page:
    """What a report says, from top to bottom.

    Attributes:
        lead: the answer in a sentence or two.
        answers: the answer as a table.
        notes: what a reader must know to trust it.
        lost: the clients that failed.
        held: name and value of what was held fixed.
        first: the picture of the first screen.
        settings: what was varied and held fixed, all of it.
        failed: label and reason of the runs that failed; `runs`, how many did not.
        toml: a configuration, and `repeat`, how to repeat from it what is shown.
        made: by which software, on what.
    """

    title: str
    lead: str
    results: Sequence[Table]
    held: Sequence[tuple[str, str]]
    made: str
    about: str = ""
    size: str = ""
    answers: Table | None = None
    notes: Sequence[str] = ()
    first: Picture | None = None
    sections: Sequence[Section] = ()
    photos: Sequence[Photo] = ()
    settings: Sequence[Table] = ()
    lost: Table | None = None
    failed: Sequence[tuple[str, str]] = ()
    runs: int = 0
    toml: str = ""
    repeat: str = ""


def write(page: Page, html: Path, figures: Path) -> None:
    """Write a report, and each picture as PNG and SVG into `figures`. Replaces what stands there."""
    for picture in (*([page.first] if page.first else []), *(p for section in page.sections for p in section.pictures)):
        save(picture, figures)
    template = _environment().get_template("report.html.j2")
    text = template.render(page=page, scale=_scale, inline=inline, label=label)
    html.parent.mkdir(parents=True, exist_ok=True)
    fresh = html.with_name(f".{html.name}.part")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(html)


def of_comparison(comparison: Comparison) -> Page:
    """The report of runs."""
    found = contenders(comparison)
    curves = _curves(found)
    first = next((picture for here in curves.values() for picture in here if picture.name.startswith("frontier")), None)
    first = first or next((picture for here in curves.values() for picture in here), None)
    alone = len(comparison.runs) == 1
    return Page(
        title=comparison.title or _title(comparison, found),
        about=comparison.about,
        size=comparison.scale,
        lead=summary.lead(found),
        answers=summary.answer_table(found),
        notes=summary.notes(comparison, found),
        held=summary.held(comparison),
        first=first,
        results=summary.results(found),
        sections=_sections(comparison, found, curves, first),
        photos=_photos(found),
        settings=summary.settings_tables(comparison, found),
        toml=to_toml(comparison.runs[0].config) if alone else "",
        repeat="it repeats the run with fedlora run config.toml" if alone else "",
        lost=summary.lost_table(found),
        failed=comparison.failed,
        runs=len(comparison.runs),
        made=summary.made(comparison),
    )


def _curves(found: Sequence[Contender]) -> dict[tuple[str, str], list[Picture]]:
    """Name and title of each metric -> its frontier and its curves; last the loss of what has no score."""
    frontiers = _by_metric(found, frontier.picture)
    out = {
        (metric.name, metric.title): [*([frontiers[metric]] if metric in frontiers else []), *score.pictures(own)]
        for metric, own in by_metric(found).items()
    }
    losses = score.losses(found)
    return out | ({("training-loss", LOSS.title): [losses]} if losses else {})


def _by_metric(found: Sequence[Contender], draw: Callable[[Sequence[Contender]], Picture | None]) -> dict[Metric, Picture]:
    """What a plot has to show of each metric by which runs are compared; where there are several, its files are named for them."""
    groups = by_metric(found)
    pictures = {metric: picture for metric, own in groups.items() if (picture := draw(own))}
    if len(groups) == 1:
        return pictures
    named = {metric: p.name if p.name.startswith(metric.name) else f"{p.name}-{metric.name}" for metric, p in pictures.items()}
    return {metric: replace(picture, name=named[metric]) for metric, picture in pictures.items()}


def _sections(
    comparison: Comparison, found: Sequence[Contender], curves: dict[tuple[str, str], list[Picture]], first: Picture | None
) -> list[Section]:
    """Those that have something to show."""
    all: dict[tuple[str, str], Sequence[Picture | None]] = {}
    for (name, what), pictures in curves.items():
        left = [picture for picture in pictures if picture is not first]
        sides = [side for side in ("round", "upload") if any(picture.name.endswith(f"-by-{side}") for picture in left)]
        all[name, f"{words.capital(what)} {' and '.join(f'by {side}' for side in sides)}"] = left
    all |= {
        ("metrics", "All metrics by round"): [*_by_metric(found, metrics.picture).values()],
        ("variation", "What was varied"): [
            *_by_metric(found, ablation.heterogeneity).values(),
            *_by_metric(found, ablation.places).values(),
        ],
        ("published", "Ours beside the published numbers"): [
            *_by_metric(found, partial(published.picture, published=comparison.published)).values()
        ],
        ("classes", "Class by class"): [classes.picture(found)],
        ("clients", "Fairness over clients"): [*_by_metric(found, clients.picture).values()],
        ("discordance", "What averaging the factors apart loses"): [discordance.picture(found)],
        ("energy", "How many of its ranks a model uses"): [energy.picture(found)],
        ("ranks", "Ranks chosen by module"): ranks.pictures(found),
        ("similarity", "Similarity of clients"): similarity.pictures(found),
        ("time", "Where the time went"): [clock.picture(found)],
    }
    shown = {key: tuple(picture for picture in pictures if picture) for key, pictures in all.items()}
    return [Section(id, heading, pictures) for (id, heading), pictures in shown.items() if pictures]


def _photos(found: Sequence[Contender]) -> list[Photo]:
    """The split of the first seed of each place, as the run folders have it drawn."""
    out: list[Photo] = []
    for where, here in by_place(found).items():
        run = here[0].runs[0]
        file = run.folder / "split.png"
        if not file.exists() or len(out) == MOST_SPLITS:
            continue
        sizes = [int(client["num_examples"]) for client in run.clients]
        caption = f"{where}: {len(sizes)} clients hold {min(sizes):,} to {max(sizes):,} training examples"
        header = ("client", "training examples", "test examples", "rank")
        rows = tuple((str(c["name"]), f"{c['num_examples']:,}", f"{c['num_test']:,}", str(c["rank"])) for c in run.clients)
        across = words.one(dealt_by(run))
        alt = f"{caption}. Heat map of training examples by client (down) and {across} (across), with each client's size."
        out.append(Photo(caption, alt, base64.b64encode(file.read_bytes()).decode(), Table(f"Clients, {where}", header, rows)))
    return out


def _scale(picture: Picture) -> float:
    """Rem of the page for an inch of a panel: as many columns as the picture asks for fill the page, none magnified much."""
    columns = min(picture.columns, len(picture.panels))
    return min(6.6, (PAGE - 1.5 * (columns - 1)) / columns / max(panel.size[0] for panel in picture.panels))


def _title(comparison: Comparison, found: Sequence[Contender]) -> str:
    data = " and ".join(dict.fromkeys(run.config.data.title for run in comparison.runs))
    methods = list(dict.fromkeys(title(contender.method) for contender in found))
    if len(comparison.runs) == 1:
        return f"{methods[0]} on {place_of(comparison.runs[0])}"
    return f"{' and '.join(methods) if len(methods) < 3 else f'{len(methods)} methods'} on {data}"


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fedlora.report", ".")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
