"""Every tracker: where a run's numbers are sent while it goes on. One file each, and the folder is the list.

A file `wandb.py` holds the tracker `wandb`: the class that is called `TRACKER` there. The package that it needs has its name, and
is an extra of its name, too.
"""

from importlib import import_module
from importlib.resources import files

from fedlora.errors import unknown
from fedlora.listed import defined_in
from fedlora.track.base import Tracker


def names() -> list[str]:
    """The trackers of the package, in alphabetical order."""
    return defined_in(files(__name__), r"^TRACKER\b.*=")


def find(name: str) -> type[Tracker]:
    """The class of a tracker. BadInput when there is none."""
    if name not in names():
        raise unknown("tracker", name, names())
    kind: type[Tracker] = import_module(f"{__name__}.{name}").TRACKER
    return kind
