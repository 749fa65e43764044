"""What clients keep, by client and round: what stays, what goes, and what a kill or a broken disk leaves."""

from pathlib import Path

import pytest
import torch

from fedlora.clients.state import RECORD, ClientState, StateStore


def state(x: float) -> ClientState:
    return ClientState(held=(torch.tensor([x, -x]), "plain"), memory={"a": torch.full((2,), x)})


def number(kept: ClientState | None) -> float | None:
    return None if kept is None else float(kept.held[0][0])


def filled(folder: Path, clients: range = range(3), rounds: range = range(1, 5)) -> StateStore:
    store = StateStore(folder, ())
    for t in rounds:
        for id in clients:
            store.put(id, t, state(10 * t + id))
        store.flush()
    return store


def test_each_round_of_each_client_is_there_for_this_and_every_later_worker(tmp_path: Path) -> None:
    one = filled(tmp_path)
    for store in (one, StateStore(tmp_path, ()), StateStore(tmp_path, (), worker=7)):
        assert [[number(store.get(id, t)) for t in range(1, 5)] for id in range(3)] == [
            [10.0 * t + id for t in range(1, 5)] for id in range(3)
        ]
        assert store.get(3, 1) is None and store.get(0, 5) is None


def test_nothing_is_there_before_it_is_flushed(tmp_path: Path) -> None:
    store = StateStore(tmp_path, ())
    store.put(0, 1, state(1))
    assert store.get(0, 1) is None and not list(tmp_path.iterdir())
    store.flush()
    assert number(store.get(0, 1)) == 1


def test_a_client_that_keeps_nothing_is_told_from_one_that_is_not_known(tmp_path: Path) -> None:
    store = StateStore(tmp_path, ())
    store.put(0, 1, ClientState())
    store.flush()
    assert StateStore(tmp_path, ()).get(0, 1) == ClientState() and store.get(1, 1) is None


def test_the_named_round_the_one_before_it_the_best_and_newer_ones_stay(tmp_path: Path) -> None:
    store = filled(tmp_path, rounds=range(1, 8))
    store.release(0, held=5, best=2)
    assert store.rounds(0) == [2, 4, 5, 6, 7] and store.rounds(1) == list(range(1, 8))
    store.release(0, held=0)  # a client that starts anew says nothing of the others
    assert store.rounds(0) == [2, 4, 5, 6, 7]


def test_a_file_goes_when_no_client_needs_it(tmp_path: Path) -> None:
    store = filled(tmp_path)
    for id in (0, 1):
        store.release(id, held=4)
    assert len(list(tmp_path.iterdir())) == 4
    store.release(2, held=4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["round-00003-0.states", "round-00004-0.states"]
    assert [number(store.get(id, 4)) for id in range(3)] == [40, 41, 42]


def test_the_last_of_several_in_one_round_counts(tmp_path: Path) -> None:
    store = filled(tmp_path, rounds=range(1, 2))
    store.put(1, 1, state(99))
    store.flush()
    assert number(store.get(1, 1)) == number(StateStore(tmp_path, ()).get(1, 1)) == 99


@pytest.mark.parametrize("left", [0, 1, RECORD.size - 1, RECORD.size, RECORD.size + 5, -1])
def test_a_record_that_a_kill_cut_off_is_not_there_and_harms_no_other(left: int, tmp_path: Path) -> None:
    store = filled(tmp_path, rounds=range(1, 2))
    file = tmp_path / "round-00001-0.states"
    start = store._places[2][1].start - RECORD.size
    whole = file.read_bytes()
    file.write_bytes(whole[: start + left] if left >= 0 else whole[:-1])
    again = StateStore(tmp_path, ())
    assert [number(again.get(id, 1)) for id in range(3)] == [10, 11, None]
    again.put(2, 1, state(5))
    again.put(3, 1, state(6))
    again.flush()
    for reader in (again, StateStore(tmp_path, ())):
        assert [number(reader.get(id, 1)) for id in range(4)] == [10, 11, 5, 6]


def test_what_is_damaged_is_not_there(tmp_path: Path) -> None:
    store = filled(tmp_path, rounds=range(1, 2))
    place = store._places[1][1]
    data = bytearray((tmp_path / place.file).read_bytes())
    data[place.start + place.length // 2] ^= 1
    (tmp_path / place.file).write_bytes(data)
    for reader in (store, StateStore(tmp_path, ())):
        assert [number(reader.get(id, 1)) for id in range(3)] == [10, None, 12]


def test_workers_of_one_folder_write_to_files_of_their_own(tmp_path: Path) -> None:
    one, two = StateStore(tmp_path, (), worker=1), StateStore(tmp_path, (), worker=2)
    for store, id in ((one, 1), (two, 2)):
        store.put(id, 1, state(id))
        store.flush()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["round-00001-1.states", "round-00001-2.states"]
    later = StateStore(tmp_path, ())
    assert number(later.get(1, 1)) == 1 and number(later.get(2, 1)) == 2


def test_without_a_folder_it_is_gone_with_the_store() -> None:
    store = StateStore(None, ())
    store.put(0, 1, state(3))
    store.flush()
    folder = store.folder
    assert number(store.get(0, 1)) == 3 and folder.exists()
    del store
    assert not folder.exists()
