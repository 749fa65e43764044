"""The methods as tables on the terminal, readable at 80 columns, and as JSON."""

import json
from dataclasses import fields

from fedlora import methods

PLAIN = ("title", "paper", "year", "exact", "mixed_ranks", "personal", "upload", "download", "server")


def as_json() -> str:
    """A list of objects."""
    found = {name: methods.find(name).FACTS for name in methods.names()}
    return json.dumps([{"name": name} | {key: getattr(facts, key) for key in PLAIN} for name, facts in found.items()], indent=1)


def print_methods() -> None:
    """What each is, what crosses the wire, and its settings."""
    from rich.console import Console
    from rich.table import Table

    kinds = {name: methods.find(name) for name in methods.names()}
    what = Table("method", "paper", "year", "exact", "mixed ranks", "personal", box=None, pad_edge=False)
    wire = Table("method", "", "for a module, in parameters", box=None, pad_edge=False)
    settings = Table("method", "settings, as --set method.NAME=VALUE", box=None, pad_edge=False)
    tick = {True: "yes", False: "-"}
    for name, kind in kinds.items():
        facts = kind.FACTS
        what.add_row(name, facts.paper, str(facts.year), *(tick[x] for x in (facts.exact, facts.mixed_ranks, facts.personal)))
        wire.add_row(name, "up", facts.upload)
        wire.add_row("", "down", facts.download)
        if fields(kind):
            settings.add_row(name, ", ".join(f.name for f in fields(kind)))
    for table in (what, wire, settings):
        Console(highlight=False).print(table, "")
