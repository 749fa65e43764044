"""Python's collector of garbage, kept from looking through what is no garbage: libraries, a model and thousands of clients are a
million objects that stay."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection within: while libraries are imported and a model is loaded they take a quarter of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def settled() -> Iterator[None]:
    """Within, what is left after the first full collection is not looked through again: each would take as long as half a round of
    a hundred clients, and there would be one every few rounds. What comes later is collected as ever. Who has frozen objects of
    his own is left alone."""
    if gc.get_freeze_count():
        yield
        return

    def settle(phase: str, found: Mapping[str, Any]) -> None:
        if phase == "stop" and found["generation"] == 2 and not gc.get_freeze_count():
            gc.freeze()

    gc.callbacks.append(settle)
    try:
        yield
    finally:
        gc.callbacks.remove(settle)
        gc.unfreeze()
