"""What a notebook shows of runs: the answer, and the first picture."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fedlora.report.html import of_comparison
from fedlora.report.picture import inline
from fedlora.report.runs import comparison, read


def summary(folders: Sequence[Path]) -> str:
    """HTML that needs nothing else: the answer in a sentence, and the panels of the report's first picture."""
    page = of_comparison(comparison([read(folder) for folder in folders]))
    text = f"<p>{escape(page.lead)}</p>"
    if page.first is None:
        return text
    panels = "".join(
        f'<div style="max-width:{100 * panel.size[0]:.0f}px">{inline(page.first, i)}</div>'
        for i, panel in enumerate(page.first.panels)
    )
    return f"{text}<p><b>{escape(page.first.finding)}</b></p>{panels}"
