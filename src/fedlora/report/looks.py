"""How a method looks in every picture: a colour, a line and a marker, the same everywhere, and told apart without colour.

The colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; their yellow is left out, for it does not
show on white. The methods of the published comparisons have filled markers and a colour each; every other method's look follows
from its name, with hollow markers, so that a new method needs no entry here; where two of them would share a colour on a page, one
gives way.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

INK, QUIET, FAINT = "#1f2328", "#6a737d", "#e4e7eb"  # text, secondary marks, grid lines
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)

T = TypeVar("T")
Dashes = tuple[float, tuple[float, ...]]
SOLID: Dashes = (0, ())
LINES: tuple[Dashes, ...] = ((0, (5, 1.5)), (0, (3, 1.5, 1, 1.5)), (0, (1.2, 1.2)), (0, (8, 2)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "osD^v<>pXP"


@dataclass(frozen=True)
class Look:
    """Colour as "#rrggbb", dashes as matplotlib takes them, a marker, filled or hollow."""

    colour: str
    line: Dashes
    marker: str
    filled: bool = True

    @property
    def face(self) -> str:
        return self.colour if self.filled else "white"

    @property
    def text(self) -> str:
        """The colour darkened until it reads well as text on white."""
        return mix(self.colour, "#000000", 0.35)


FIXED = {
    "lora-a2": Look(RED, SOLID, "o"),
    "fedit": Look(BLUE, LINES[0], "s"),
    "ffa-lora": Look(GREEN, LINES[1], "^"),
    "flexlora": Look(ORANGE, LINES[2], "D"),
    "fedavg": Look(BLACK, LINES[3], "P"),
    "hetlora": Look(PINK, LINES[4], "v"),
    "rolora": Look(SKY, LINES[0], "X"),
    "raflora": Look(GREEN, LINES[3], "p"),  # beside FlexLoRA as a rule
}


def look(method: str) -> Look:
    """The look of a method, by the name that a configuration has for it."""
    return FIXED.get(method) or _look_of_name(method)


def _look_of_name(method: str) -> Look:
    number = zlib.crc32(f"look:{method}".encode())
    number, colour = divmod(number, len(COLOURS))
    number, line = divmod(number, len(LINES))
    return Look(COLOURS[colour], LINES[line], MARKERS[number % len(MARKERS)], filled=False)


def page(methods: Iterable[str]) -> dict[str, Look]:
    """The looks of the methods of one page, all different. Each keeps its own where it can; of those that would share a colour, and
    have no fixed look, the later by name takes the nearest free colour, line and marker."""
    out: dict[str, Look] = {}
    for method in sorted(set(methods), key=lambda method: (method not in FIXED, method)):
        fixed = FIXED.get(method)
        out[method] = fixed or _free(look(method), list(out.values()))
    return out


def _free(own: Look, taken: Sequence[Look]) -> Look:
    """`own`, moved to the colour that fewest have, and there to the line and the marker that fewest of this colour have."""
    count = Counter(other.colour for other in taken)
    colour = min(_from(COLOURS, own.colour), key=lambda colour: count[colour])
    alike = [other for other in taken if other.colour == colour]
    lines, markers = Counter(other.line for other in alike), Counter(other.marker for other in alike)
    line = min(_from(LINES, own.line), key=lambda line: lines[line])
    marker = min(_from(MARKERS, own.marker), key=lambda marker: markers[marker])
    return replace(own, colour=colour, line=line, marker=marker)


def _from(known: Sequence[T], first: T) -> list[T]:
    """All of them in a circle that begins with `first`."""
    start = list(known).index(first)
    return [*known[start:], *known[:start]]


def variants(first: Look, count: int, alone: bool) -> Sequence[Look]:
    """Looks for `count` settings of one method: shades of its colour, or colours of their own where it is the only method."""
    if count == 1:
        return [first]
    if alone:
        return [Look(COLOURS[i % len(COLOURS)], (SOLID, *LINES)[i % 6], MARKERS[i % len(MARKERS)]) for i in range(count)]
    markers = MARKERS[MARKERS.index(first.marker) :] + MARKERS
    return [
        replace(first, colour=mix(first.colour, "#ffffff", 0.6 * i / count), line=(first.line, *LINES)[i % 6], marker=markers[i])
        for i in range(count)
    ]


def mix(colour: str, other: str, share: float) -> str:
    """`colour` with a share of another."""
    pairs = [(int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round((1 - share) * a + share * b):02x}" for a, b in pairs)
