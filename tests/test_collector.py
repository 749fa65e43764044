"""The collector of garbage around a run."""

import gc
import weakref

import pytest

from fedlora.collector import settled, uncollected


@pytest.mark.parametrize("was", [True, False])
def test_the_collector_is_left_as_it_was(was: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gc, "isenabled", lambda: was)
    monkeypatch.setattr(gc, "disable", lambda: seen.append("off"))
    monkeypatch.setattr(gc, "enable", lambda: seen.append("on"))
    with pytest.raises(ValueError), uncollected():
        raise ValueError
    assert seen == (["off", "on"] if was else ["off"])


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.own = self


def test_what_stays_is_looked_through_once_and_garbage_is_found_as_ever() -> None:
    stays = [[i] for i in range(1000)]
    with settled():
        assert not gc.get_freeze_count()  # what is garbage by now would be kept
        early = weakref.ref(Ring())
        gc.collect()
        assert early() is None and gc.get_freeze_count() > len(stays)
        looked = len(gc.get_objects())
        late = weakref.ref(Ring())
        gc.collect()
        assert late() is None and len(gc.get_objects()) < looked + 1000
    assert not gc.get_freeze_count() and not any("settle" in repr(each) for each in gc.callbacks)


def test_after_it_what_stayed_can_be_garbage() -> None:
    kept = Ring()
    gone = weakref.ref(kept)
    with settled():
        gc.collect()
        del kept
        gc.collect()
        assert gone() is not None
    gc.collect()
    assert gone() is None


def test_what_somebody_else_has_frozen_stays_so() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with settled():
            gc.collect()
        assert 0 < gc.get_freeze_count() <= count
    finally:
        gc.unfreeze()
