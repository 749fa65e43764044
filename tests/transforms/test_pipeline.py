"""Transforms on real Ups: what travels and what the server reads, memory and its places, what is refused, whole runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from served import answers, rounds
from tiny import Silent
from toy import Trainer, federate, make_clients, make_setup, play, same

from fedlora import methods, types, wire
from fedlora.check import refuse
from fedlora.clients.state import ClientState, StateStore
from fedlora.config import HeadMode, TransformConfig, as_tables, resolve, to_toml
from fedlora.errors import BadInput
from fedlora.gather import mean
from fedlora.history import History
from fedlora.methods.fedit import FedIT, Up
from fedlora.methods.lora_a2 import Up as RankUp
from fedlora.runs.play import execute
from fedlora.server import checkpoint
from fedlora.server.loop import Server
from fedlora.summary import read_rows
from fedlora.transforms import pipeline
from fedlora.types import Client, Nothing, Reply, Unfit

CLIENT = Client(3, 2, 10)


BARE = ["ranks", "where_A", "where_B"]  # the index fields of LoRA-A2, FSLoRA and FLASC


def make(*tables, method=None, seed=0):
    configs = [TransformConfig(**table) for table in tables]
    return pipeline.make(configs, method or FedIT(), seed)


TOPK, INT4 = {"name": "topk", "density": 0.1}, {"name": "quantise", "to": "int4"}
PIPELINES = [
    [{"name": "clip", "max_norm": 0.5, "bare": BARE}],
    [{"name": "gaussian", "scale": 0.01, "bare": BARE}],
    [{"name": "clip", "max_norm": 0.5, "bare": BARE}, {"name": "laplace", "scale": 0.01}],
    [{"name": "quantise", "to": "bf16"}],
    [{"name": "quantise", "to": "int8"}],
    [INT4],
    [TOPK],
    [TOPK, INT4],
    [{"name": "clip", "max_norm": 0.5}, TOPK, {"name": "gaussian", "scale": 0.01, "bare": [*BARE, "topk"]}, INT4],
]


def some_up(seed: int = 0, dtype=torch.float32) -> Up:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.normal(size=shape), dtype=dtype)

    return Up({"q": draw(2, 8), "up": draw(2, 12)}, {"q": draw(12, 2), "up": draw(20, 2)})


def total(up) -> np.ndarray:
    return np.concatenate([x.double().numpy().ravel() for part in (up.A, up.B) for x in part.values()])


def carried(message, method):
    """What is left after a message was encoded and decoded."""
    return wire.decode(wire.encode(message), [*wire.message_classes(method), *pipeline.message_classes()])


def rows_of(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_rows(out)]


def same_runs(one: Path, two: Path) -> None:
    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, two))
    assert rows_of(one) == rows_of(two) and same(a, b)


# ---- there and back -----------------------------------------------------------------------------------------------------------


def test_no_transforms_leave_the_very_message():
    up, memory = some_up(), {"x": torch.ones(1)}
    plain = make()
    sent, kept = plain.pack(up, memory, 1, CLIENT)
    assert sent is up and kept is memory and plain.unpack(sent) is up
    assert plain.measure(up) == wire.measure(up)


@pytest.mark.parametrize("tables", PIPELINES, ids=lambda tables: " ".join(t["name"] for t in tables))
@pytest.mark.parametrize("name", ["fedavg", "fedit", "lora-a2", "flasc", "fslora", "slora"])
def test_every_up_of_changes_comes_back_in_its_shapes_after_a_real_journey(name, tables):
    method, setup = methods.make(name, {}), make_setup(make_clients((2, 2)), dtype=torch.float32)
    transforms, trainer = make(*tables, method=method), Trainer(setup)
    for client in setup.clients:
        held, memory = method.hold(setup, client), {}
        up, _ = play(method, trainer, method.send(method.init(setup), client, 1), held, client)
        sent, memory = transforms.pack(up, memory, 1, client)
        got = transforms.unpack(carried(sent, method))
        assert refuse(got, method, setup, client) is None
        assert same(got, transforms.unpack(sent))
        assert transforms.measure(sent).total == len(wire.encode(sent))


def test_the_bytes_shrink_and_the_values_that_travel_are_counted():
    up = Up({"m": torch.randn(8, 300)}, {"m": torch.randn(500, 8)})
    whole = len(wire.encode(up))
    for tables, share, values in (
        ([{"name": "quantise", "to": "bf16"}], 0.5, 6400),
        ([{"name": "quantise", "to": "int8"}], 0.25, 6400),
        ([INT4], 0.125, 6400),
        ([TOPK], 0.1 + 1 / 32, 640),
        ([TOPK, INT4], 0.1 / 8 + 1 / 32, 640),
        ([{"name": "topk", "density": 0.01}], 0.02, 64),
        ([{"name": "clip", "max_norm": 0.5}], 1.0, 6400),
    ):
        transforms = make(*tables)
        sent, _ = transforms.pack(up, {}, 1, CLIENT)
        assert transforms.measure(sent).numbers == values
        assert abs(len(wire.encode(sent)) - share * whole) < 500  # the header
        size = transforms.measure(sent)
        assert size.indices == (6400 / 8 if tables[0] is TOPK else 256 if "density" in tables[0] else 0)


def test_no_message_class_has_the_name_of_another():
    """Classes travel by name, so a method's must differ from those that lie beside them in a message or a checkpoint."""
    beside = [Server, ClientState, History, *pipeline.message_classes(), *(c for c in vars(types).values() if isinstance(c, type))]
    for name in methods.names():
        own = {c.__name__ for c in wire.message_classes(methods.make(name, {}))}
        assert not own & {c.__name__ for c in beside}, name


# ---- order and draws ----------------------------------------------------------------------------------------------------------


def test_transforms_act_in_the_order_of_the_list():
    """Clipping bounds what comes before it, and nothing after it."""
    clip, noise = {"name": "clip", "max_norm": 1.0}, {"name": "gaussian", "scale": 1.0}
    up = some_up(dtype=torch.float64)
    norms = []
    for tables in ([noise, clip], [clip, noise]):
        transforms = make(*tables)
        norms.append(np.linalg.norm(total(transforms.unpack(transforms.pack(up, {}, 1, CLIENT)[0]))))
    assert norms[0] == pytest.approx(1.0) and norms[1] > 5
    # Top-k, then quantise: the kept entries, of all tensors together, each in steps of its tensor's largest.
    transforms = make(TOPK, INT4)
    got = total(transforms.unpack(transforms.pack(up, {}, 1, CLIENT)[0]))
    kept = np.abs(total(up)) >= np.sort(np.abs(total(up)))[-int(0.1 * len(got))]
    assert not got[~kept].any() and np.count_nonzero(got) > 0


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_noise_differs_by_seed_round_client_and_place_and_by_nothing_else(name):
    up, tables = some_up(), [{"name": name, "scale": 1.0}]

    def noise(seed=0, round=1, client=CLIENT, tables=tables):
        transforms = make(*tables, seed=seed)
        return total(transforms.unpack(transforms.pack(up, {}, round, client)[0])) - total(up)

    first = noise()
    assert np.array_equal(first, noise())
    others = [noise(seed=1), noise(round=2), noise(client=Client(4, 2, 10)), noise(tables=tables * 2) - first]
    assert all(np.abs(np.corrcoef(first, x)[0, 1]) < 0.4 for x in others)


# ---- memory -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tables", [[TOPK], [INT4], [{"name": "quantise", "to": "int4", "stochastic": False}], [TOPK, INT4]], ids=str
)
def test_with_error_feedback_all_arrives_in_time_and_without_it_it_does_not(tables):
    """The same change every round: what has arrived differs from what was sent by the memory, which stays bounded."""
    up = some_up(dtype=torch.float64)
    off = [{**table, "error_feedback": False} for table in tables]
    gaps = {}
    for key, use in (("with", tables), ("without", off)):
        transforms, memory, arrived = make(*use), {}, 0.0
        for t in range(1, 201):
            sent, memory = transforms.pack(up, memory, t, CLIENT)
            arrived = arrived + total(transforms.unpack(sent))
        gaps[key] = np.linalg.norm(arrived / 200 - total(up)) / np.linalg.norm(total(up))
        if key == "with":
            left = np.concatenate([x.numpy().ravel() for x in memory.values()])
            np.testing.assert_allclose(arrived + left, 200 * total(up), atol=1e-9)
        else:
            assert not memory
    assert gaps["with"] < 0.1
    assert gaps["without"] > 3 * gaps["with"] or tables == [INT4]  # which is unbiased by itself


def test_noise_and_clipping_are_not_fed_back():
    """Memory holds what compression lost of the noisy change, so noise is not taken back later."""
    up = some_up(dtype=torch.float64)
    for tables in ([{"name": "gaussian", "scale": 1.0}], [{"name": "clip", "max_norm": 0.1}]):
        assert not make(*tables).pack(up, {}, 1, CLIENT)[1]
    transforms = make(TOPK, {"name": "gaussian", "scale": 1.0, "bare": ["topk"]})
    _, memory = transforms.pack(up, {}, 1, CLIENT)
    kept = np.abs(total(up)) >= np.sort(np.abs(total(up)))[-int(0.1 * len(total(up)))]
    left = np.concatenate([x.numpy().ravel() for x in memory.values()])
    np.testing.assert_array_equal(left, np.where(kept, 0.0, total(up)))


def test_memory_follows_the_ranks_that_a_client_chose():
    """LoRA-A2's columns: round 1 sends ranks 0 and 2, round 2 ranks 1 and 2. Only rank 2 recalls, the others keep what they had."""
    transforms = make({"name": "topk", "density": 0.5}, method=methods.make("lora-a2", {}))
    one = RankUp(B={"q": torch.tensor([[9.0, 1.0], [8.0, 2.0]])}, ranks={"q": torch.tensor([True, False, True])})
    _, memory = transforms.pack(one, {}, 1, CLIENT)
    assert memory["B q"].tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]]  # 9 and 8 went
    two = replace(one, B={"q": torch.tensor([[5.0, 0.5], [0.25, 4.0]])}, ranks={"q": torch.tensor([False, True, True])})
    sent, memory = transforms.pack(two, memory, 2, CLIENT)
    assert transforms.unpack(sent).B["q"].tolist() == [[5.0, 0.0], [0.0, 6.0]]  # 4 + 2 from memory
    assert memory["B q"].tolist() == [[0.0, 0.0, 1.5], [0.0, 0.25, 0.0]]
    three = RankUp(A={"q": torch.ones(1, 4)}, ranks={"q": torch.tensor([True, False, False])})  # a round of the other factor
    _, after = transforms.pack(three, memory, 3, CLIENT)
    assert torch.equal(after["B q"], memory["B q"]) and after["A q"].shape == (3, 4)


def test_memory_of_another_shape_is_forgotten():
    transforms = make(TOPK)
    _, memory = transforms.pack(some_up(), {}, 1, CLIENT)
    _, fresh = transforms.pack(some_up(), {n: torch.ones(1, 1) for n in memory}, 1, CLIENT)
    assert same(fresh, memory)


# ---- the server ---------------------------------------------------------------------------------------------------------------


class Fixed:
    """A transport that answers with made messages."""

    def __init__(self, replies):
        self.replies = replies

    def exchange(self, asks):
        return answers(asks, self.replies)


def test_the_server_refuses_what_it_cannot_read_and_takes_the_rest():
    method, setup = FedIT(), make_setup(make_clients((2,) * 8), rounds=1, dtype=torch.float32)
    transforms = make(TOPK, INT4)
    sent, _ = transforms.pack(some_up(), {}, 1, CLIENT)
    name = next(iter(sent.numbers))
    other = transforms.pack(replace(some_up(), A={"x": torch.ones(2, 8)}), {}, 1, CLIENT)[0]
    bad = [
        some_up(),  # not transformed
        replace(sent, numbers={}),
        replace(sent, numbers={**sent.numbers, name: torch.zeros(3, dtype=torch.uint8)}),
        replace(sent, sides=sent.sides[:1]),
        replace(sent, up=FedIT),
        replace(
            sent, sides=(sent.sides[0], replace(sent.sides[1], scale={n: s * torch.nan for n, s in sent.sides[1].scale.items()}))
        ),
        other,
    ]
    transport = Fixed([Reply(client, up) for client, up in zip(setup.clients, [*bad, sent], strict=True)])
    ((server, tally, _),) = rounds(method, setup, Server(0, method.init(setup)), transport, lambda t: setup.clients, transforms)
    assert tally.accepted == [7] and server.accepted == {7: 1} and sorted(tally.failed) == list(range(7))
    assert all("\n" not in why for why in tally.failed.values())
    for i, word in ((0, "did not go through"), (1, "empty"), (2, "cannot be read"), (3, "cannot be read"), (6, "lacks")):
        assert word in tally.failed[i]
    expected = transforms.unpack(sent)
    got = server.state.A["q"] - setup.fresh(2).A["q"]
    torch.testing.assert_close(got, expected.A["q"])


def test_the_server_of_a_run_without_transforms_refuses_a_packed_message():
    sent, _ = make(TOPK).pack(some_up(), {}, 1, CLIENT)
    setup = make_setup(make_clients((2,) * 4))
    assert "Packed" in refuse(make().unpack(sent), FedIT(), setup, CLIENT)


# ---- what is refused before training ------------------------------------------------------------------------------------------


def test_methods_that_send_values_are_refused_with_the_field():
    """By what they really send: every method is either refused, or all of its first message is changes and indices."""
    setup, refused = make_setup(make_clients((2,) * 4)), set()
    for name in ("fedavg", "fedit", "ffa-lora", "flexlora", "flora", "hetlora", "lora-a2", "rolora", "fslora", "flasc", "slora"):
        method = methods.make(name, {})
        up = federate(method, setup, 1).rounds[1][0][1].up
        values = [f for f, x in vars(type(up))["__dataclass_fields__"].items() if x.metadata.get("kind") == "value"]
        if values:
            refused.add(name)
            with pytest.raises(BadInput, match=r"uploads '[AB]' as a value, not as a change, so transform clip") as caught:
                make({"name": "clip", "max_norm": 1.0}, method=method)
            assert method.FACTS.title in str(caught.value) and "\n" not in str(caught.value)
            make(method=method)  # without transforms it is welcome
        else:
            make({"name": "clip", "max_norm": 1.0, "bare": BARE}, method=method)
    assert refused == {"flexlora", "flora", "hetlora"}


TELLING = [
    ("lora-a2", {}, [], HeadMode.FROZEN, "ranks"),
    ("fslora", {}, [], HeadMode.FROZEN, "ranks"),
    ("flasc", {}, [], HeadMode.FROZEN, "where_A"),
    ("ce-lora", {}, [], HeadMode.PERSONAL, "mixtures"),
    ("fedit", {}, [], HeadMode.SHARED, "head"),
    ("fedit", {}, [TOPK], HeadMode.FROZEN, "topk"),
]


@pytest.mark.parametrize(
    "noise", [{"name": "clip", "max_norm": 1.0}, {"name": "gaussian", "scale": 1.0}, {"name": "laplace", "scale": 1.0}]
)
@pytest.mark.parametrize("name, settings, before, head, what", TELLING)
def test_what_clipping_and_noise_leave_alone_must_be_named(name, settings, before, head, what, noise):
    """Class means, chosen ranks, masks and a shared head tell of the data, however much noise is on the changes."""
    method = methods.make(name, settings)
    with pytest.raises(BadInput, match=f"transform {noise['name']} acts on changes alone, but '{what}'.*bare") as caught:
        pipeline.make(resolve({"transform": [*before, noise]}).transform, method, 0, head)
    assert "\n" not in str(caught.value)
    named = resolve({"transform": [*before, {**noise, "bare": [*BARE, "mixtures", "head", "topk"]}]})
    assert len(pipeline.make(named.transform, method, 0, head).steps) == len(before) + 1
    for saving in (TOPK, INT4):  # these save bytes, and promise nothing
        pipeline.make(resolve({"transform": [saving]}).transform, method, 0, head)


@pytest.mark.parametrize("tables", [[TOPK], [INT4], [TOPK, INT4], [{"name": "clip", "max_norm": 0.5}]], ids=str)
def test_an_up_without_changes_travels_as_it_is(tables):
    """FedDPA-F sends Nothing once the global adapter is learned, and a client that diverged says that it is Unfit."""
    transforms = make(*tables, method=methods.make("feddpa", {"variant": "f"}))
    for up in (Nothing(), Unfit("diverged")):
        memory = {"A q": torch.ones(2, 8)}
        sent, kept = transforms.pack(up, memory, 3, CLIENT)
        assert sent is up and kept is memory and transforms.unpack(sent) is up


def test_codes_can_only_come_last():
    with pytest.raises(BadInput, match=r"transform quantise leaves codes.*last"):
        make(INT4, TOPK)


@pytest.mark.parametrize(
    "table, says", [({}, "transform"), ({"name": "clp"}, "did you mean clip"), ({"name": "clip", "norm": 1}, "clip.norm")], ids=str
)
def test_a_bad_table_is_refused_in_one_line(table, says, base: dict, tmp_path: Path):
    with pytest.raises(BadInput, match=says) as caught:
        execute(resolve({**base, "transform": [table]}), tmp_path / "run", False, Silent())
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_configuration_of_transforms_survives_its_file():
    import tomllib

    config = resolve({"transform": [TOPK, INT4]})
    assert [(t.name, t.settings) for t in config.transform] == [("topk", {"density": 0.1}), ("quantise", {"to": "int4"})]
    assert resolve(tomllib.loads(to_toml(config))) == config and as_tables(config)["transform"] == [TOPK, INT4]
    assert resolve(tomllib.loads(to_toml(resolve()))).transform == []


# ---- whole runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(bert_folder: Path, csv_folder: Path) -> dict:
    return {
        "precision": "fp32",
        "model": {"source": str(bert_folder)},
        "data": {"source": str(csv_folder), "alpha": 1.0},
        "clients": {"count": 4, "rank": 2, "sample": 3},
        "train": {"rounds": 4, "batch_size": 8, "lr": 5e-3},
    }


@pytest.mark.parametrize(
    "name, tables",
    [("lora-a2", [TOPK, INT4]), ("flasc", [{"name": "clip", "max_norm": 0.5, "bare": BARE}, {"name": "gaussian", "scale": 1e-3}])],
    ids=["lora-a2", "flasc"],
)
def test_stopped_and_resumed_equals_uninterrupted_with_transforms(name: str, tables: list, base: dict, tmp_path: Path) -> None:
    config = resolve(base, {"method": {"name": name}, "transform": tables})
    execute(config, tmp_path / "whole", False, Silent())
    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path / "parts", False, Silent(2))
    execute(config, tmp_path / "parts", True, Silent())
    same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_with_transforms_sends_less_and_still_learns(base: dict, tmp_path: Path) -> None:
    train = {"rounds": 4, "epochs": 2, "batch_size": 8, "lr": 2e-2}
    rows = {}
    for name, tables in (("plain", []), ("packed", [{"name": "topk", "density": 0.25}, {"name": "quantise", "to": "int8"}])):
        config = resolve(base, {"method": {"name": "fedit"}, "train": train, "transform": tables})
        execute(config, tmp_path / name, False, Silent())
        rows[name] = rows_of(tmp_path / name)
    for plain, packed in zip(rows["plain"], rows["packed"], strict=True):
        assert packed["upload_params"] == 3 * int(0.25 * plain["upload_params"] / 3)
        assert packed["upload_values_bytes"] < 0.25 * plain["upload_values_bytes"]
        assert packed["upload_bytes"] == sum(packed[f"upload_{part}_bytes"] for part in ("values", "indices", "header"))
        assert packed["upload_bytes"] < plain["upload_bytes"] and packed["download_bytes"] == plain["download_bytes"]
    assert rows["packed"][-1]["loss"] < 0.9 * rows["packed"][0]["loss"]


def test_clients_that_are_refused_keep_the_memory_they_had(base: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    write = checkpoint.save

    def spy(folder, server, *more):
        states = StateStore(tmp_path / "run" / "states", [ClientState])
        kept[server.round] = {id: states.get(id, round) for id, round in server.accepted.items()}
        return write(folder, server, *more)

    monkeypatch.setattr(checkpoint, "save", spy)
    real = mean.refuse
    monkeypatch.setattr(mean, "refuse", lambda up, m, s, c: "no" if c.id == 1 and len(kept) == 1 else real(up, m, s, c))
    clients, train = {"count": 4, "rank": 2, "sample": 4}, base["train"] | {"rounds": 3}
    config = resolve(base, {"method": {"name": "fedit"}, "clients": clients, "train": train, "transform": [TOPK]})
    execute(config, tmp_path / "run", False, Silent())
    assert same(kept[2][1], kept[1][1]) and not same(kept[3][1], kept[2][1]) and not same(kept[2][0], kept[1][0])
