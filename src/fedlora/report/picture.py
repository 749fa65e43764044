"""A picture of the report: panels that matplotlib draws, what they say in words, and their numbers as tables.

On the page every panel is an SVG of its own, which the page lays out for its width, so that text keeps its size on a phone. The
files beside the page hold all panels of a picture in one figure.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.report.looks import FAINT, INK, QUIET

FONT = "DejaVu Sans"  # which matplotlib brings along
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": [FONT, "Verdana"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a name is no mathematics, whatever dollar signs it has
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "hatch.linewidth": 0.5,
}
DPI = 150
TITLE, HEADING = 11.5, 9.0  # points, in bold


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first `heads` columns name the row."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    heads: int = 1


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `draw` gets matplotlib's Axes; `size` is inches."""

    heading: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (4.1, 3.0)


@dataclass(frozen=True)
class Picture:
    """Panels that belong together.

    Attributes:
        name: of its files.
        finding: its title: what it shows, computed from the numbers.
        about: how to read it: units, and what bands are.
        tables: every number of it.
        columns: panels side by side in the files.
        alt: for those who cannot see it; made of the finding and the headings where it is empty.
    """

    name: str
    finding: str
    about: str
    panels: tuple[Panel, ...]
    tables: tuple[Table, ...]
    columns: int = 3  # at most
    alt: str = ""


def inline(picture: Picture, index: int) -> str:
    """The SVG element of one panel, for an HTML page: no outside name in it, its ids its own, its text hidden behind a label."""
    panel = picture.panels[index]
    with _figure(panel.size, fonttype="none", salt=f"{picture.name}-{index}") as figure:
        panel.draw(figure.subplots())
        text = _svg(figure)
    return _embedded(text, label(picture, index))


def label(picture: Picture, index: int) -> str:
    """What a screen reader says for a panel."""
    heading = picture.panels[index].heading
    own = picture.alt or f"{picture.finding}. {picture.about}"
    return f"{heading}: {own}" if heading else own


def save(picture: Picture, folder: Path) -> None:
    """NAME.png and NAME.svg: all panels in one figure with the finding as its title."""
    panels = picture.panels
    columns = min(picture.columns, len(panels))
    rows = -(-len(panels) // columns)
    wide, high = max(p.size[0] for p in panels), max(p.size[1] for p in panels) + 0.25
    width = max(columns * wide, 5.0)
    title = wrap(picture.finding, TITLE, 72 * width - 12)
    headings = [wrap(panel.heading, HEADING, 72 * wide - 50) for panel in panels]  # beside the names of the ticks
    deepest = max(heading.count("\n") for heading in headings)
    size = (width, rows * (high + 0.15 * deepest) + 0.22 * (title.count("\n") + 1) + 0.1)
    with _figure(size, fonttype="path", salt=picture.name) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel, heading in zip(grid, panels, headings, strict=False):
            panel.draw(axes)
            axes.set_title(heading, loc="left", fontsize=HEADING, fontweight="bold", color=INK)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
        figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE, fontweight="bold")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{picture.name}.svg").write_text(_svg(figure))
        figure.dpi = DPI  # which writing the SVG has changed; letters differ in width with it, so places are found anew
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(figure).print_png(str(folder / f"{picture.name}.png"), metadata={"Software": None})


@contextmanager
def _figure(size: tuple[float, float], fonttype: str, salt: str) -> Iterator[Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"svg.fonttype": fonttype, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is drawn as boxes
        yield Figure(figsize=size, dpi=DPI, layout="constrained")


def _svg(figure: Any) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return out.getvalue()


def _embedded(svg: str, label: str) -> str:
    """An SVG document as an element of an HTML page, which needs none of the document's declarations."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    width, height = (float(x) for x in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return head + svg[svg.index(">") + 1 :].strip()


def wrap(text: str, size: float, width: float, weight: str = "bold") -> str:
    """A text in lines no wider than `width` when it is written in letters of `size`, both in points: measured, not counted. Words
    are kept whole, but for one that is wider than a line."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=FONT, size=size, weight=weight)

    def fits(line: str) -> bool:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # as where the text is drawn
            return bool(text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] <= width)

    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if fits(joined):
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while not fits(lines[-1]) and len(lines[-1]) > 1:
            part = max((n for n in range(1, len(lines[-1])) if fits(lines[-1][:n])), default=1)
            lines[-1:] = [lines[-1][:part], lines[-1][part:]]
    return "\n".join(lines)


def spread_apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to `values`, in their order, that are `gap` apart and within [low, high] as far as there is room."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    placed: list[float] = []
    for i in order:
        placed.append(max([values[i], low, *(p + gap for p in placed[-1:])]))
    limit = high
    for i in reversed(range(len(placed))):
        limit = placed[i] = min(placed[i], limit)
        limit -= gap
    out = [0.0] * len(values)
    for i, place in zip(order, placed, strict=True):
        out[i] = place
    return out
