"""A method looks the same everywhere, unlike any other, and its name can be read on white."""

import pytest

from fedlora import methods
from fedlora.report.looks import COLOURS, FIXED, Look, look, mix, page, variants


def test_every_method_has_a_look_of_its_own() -> None:
    looks = {name: look(name) for name in methods.names()}
    assert len({(each.line, each.marker, each.filled, each.colour) for each in looks.values()}) == len(looks)


def test_the_published_comparison_differs_in_colour_line_and_marker() -> None:
    published = [look(name) for name in ("fedavg", "fedit", "ffa-lora", "flexlora", "lora-a2")]
    for part in ("colour", "line", "marker"):
        assert len({getattr(each, part) for each in published}) == len(published), part


def test_only_fixed_looks_are_filled() -> None:
    assert {name for name in methods.names() if look(name).filled} == set(FIXED)


def test_looks_do_not_change() -> None:
    """Pictures of different days agree, whatever methods are added."""
    assert look("lora-a2") == Look("#D55E00", (0, ()), "o")
    assert look("flora") == Look("#E69F00", (0, (1.2, 1.2)), "D", filled=False)


def test_the_methods_of_one_page_differ_in_colour_line_and_marker() -> None:
    """Seven whose own colour is blue have one each; all methods at once are more than there are colours."""
    blue = ["fed-sb", "feddpa", "fedloru", "fedsvd", "flasc", "florist", "fslora"]
    assert len({look(name).colour for name in blue}) == 1
    few = page(blue)
    assert {each.colour for each in few.values()} == set(COLOURS)
    everything = page(methods.names())
    assert len({(each.colour, each.line, each.marker) for each in everything.values()}) == len(everything) > 25
    assert page(reversed(methods.names())) == everything
    assert {name: everything[name] for name in FIXED} == FIXED


def test_a_look_gives_way_only_to_another() -> None:
    assert page(["flora", "lora-a2"]) == {"flora": look("flora"), "lora-a2": look("lora-a2")}


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("name", methods.names())
def test_names_are_readable_on_white(name: str) -> None:
    assert 1.05 / (luminance(look(name).text) + 0.05) >= 4.5


def test_variants_are_told_apart() -> None:
    for alone in (True, False):
        found = variants(look("lora-a2"), 5, alone)
        assert len({(each.line, each.marker) for each in found}) == 5
    assert variants(look("fedit"), 1, alone=True) == [look("fedit")]


def test_mix() -> None:
    assert mix("#ff0000", "#0000ff", 0.25) == "#bf0040"
