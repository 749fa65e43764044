"""Memory of what transforms lost: it stays with the entries that it belongs to, in every method that can be transformed."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from cases import ROWS, Row, takes_part
from laws import FIRST
from toy import Trainer, make_clients, make_setup, play, top_up

from fedlora import methods
from fedlora.config import TransformConfig
from fedlora.errors import BadInput
from fedlora.messages import TrainAsk
from fedlora.methods.ravan import best_heads
from fedlora.transforms import pipeline
from fedlora.transforms.pipeline import Pipeline
from fedlora.types import Client, Nothing, Reply, Trained

TABLES = [
    [{"name": "topk", "density": 0.2}],
    [{"name": "quantise", "to": "int4", "stochastic": False}],
    [{"name": "topk", "density": 0.2}, {"name": "quantise", "to": "int8"}],
]


def transforms_for(method, tables) -> Pipeline | None:
    """None where the method's messages are not changes alone."""
    try:
        return pipeline.make([TransformConfig(**table) for table in tables], method, 0)
    except BadInput:
        return None


def in_place(name: str, up, down) -> dict[str, np.ndarray]:
    """ "field module" -> a change in the whole of what it could hold, zero where it holds nothing: written method by method."""
    out = {}
    for f in (f for f in fields(up) if f.metadata.get("kind") == "change"):
        for m, x in getattr(up, f.name).items():
            x = x.numpy()
            if name in ("lora-a2", "fslora"):
                whole, chosen = np.zeros((len(x), 4) if f.name == "B" else (4, x.shape[1])), up.ranks[m].numpy()
                (whole.T if f.name == "B" else whole)[chosen] = x.T if f.name == "B" else x
            elif name == "flasc":
                where = (up.where_A if f.name == "A" else up.where_B)[m].numpy()
                whole = np.zeros(len(where))
                whole[np.flatnonzero(where)] = x
            elif name == "ravan":
                heads, rank, _ = down[m].shape
                whole = np.zeros((heads, rank, rank))
                whole[best_heads(down, rank * len(x) // heads)] = x
            else:
                whole = x
            out[f"{f.name} {m}"] = whole
    return out


@pytest.mark.parametrize("tables", TABLES, ids=lambda tables: " ".join(t["name"] for t in tables))
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if id(row) in FIRST else pytest.mark.slow)
        for row in ROWS
        if transforms_for(row.make(), TABLES[0])
    ],
    ids=str,
)
def test_what_was_learned_is_what_arrived_and_what_is_remembered(row: Row, tables):
    """Entry by entry, for every client, over five rounds in which some sit out."""
    method, setup = row.make(), make_setup(make_clients(row.ranks, tasks=row.tasks))
    transforms, trainer, state = transforms_for(method, tables), Trainer(setup, lr=row.lr), row.make().init(setup)
    held, memory = {c.id: method.hold(setup, c) for c in setup.clients}, {c.id: {} for c in setup.clients}
    learned, arrived, lost = ({c.id: {} for c in setup.clients} for _ in range(3))
    for t in range(1, 6):
        replies = []
        for client in (c for c in setup.clients if takes_part(c.id, t)):
            down = method.send(state, client, t)
            top_up(trainer, method, state, TrainAsk(t, client, down))
            up, held[client.id] = play(method, trainer, down, held[client.id], client, t)
            if type(up) is Nothing:
                replies.append(Reply(client, up))
                continue
            sent, memory[client.id] = transforms.pack(up, memory[client.id], t, client)
            got = transforms.unpack(sent)
            for total, message in ((learned, up), (arrived, got)):
                for name, x in in_place(row.method, message, down).items():
                    total[client.id][name] = total[client.id].get(name, 0.0) + x
            lost[client.id] |= {name: True for name, x in memory[client.id].items() if x.any()}
            replies.append(Reply(client, got))
        state, _ = method.aggregate(state, iter(replies), t)
    for id, total in learned.items():
        assert lost[id] and memory[id].keys() == total.keys()
        for name, x in total.items():
            np.testing.assert_allclose(memory[id][name].numpy().reshape(x.shape), x - arrived[id][name], rtol=0, atol=1e-10)


def test_memory_stays_with_the_head_that_a_client_trained():
    """RAVAN, a budget of one head of two: the first round trains head 0, the second head 1, whose core has grown larger, the third
    head 0 again. Only the third recalls what the first did not send."""
    setup = make_setup([Client(0, 1, 1), Client(1, 2, 3)], shapes={"m": (5, 3)})
    method, client = methods.make("ravan", {"heads": 2}), setup.clients[0]
    transforms, memory, arrived = transforms_for(method, [{"name": "topk", "density": 0.25}]), {}, []
    for t, (best, change) in enumerate(
        [(0, [[9.0, 1.0], [2.0, 3.0]]), (1, [[0.0, 0.5], [7.0, 0.0]]), (0, [[0.0, 4.0], [0.0, 0.0]])], 1
    ):
        H = torch.ones(2, 2, 2, dtype=torch.float64)
        H[best] = 2.0
        g = method.local({"m": H}, method.hold(setup, client), client, 1)
        slots = dict(next(g).slots)
        f = slots[f"head{best}"]
        slots[f"head{best}"] = f.with_role("C", {"m": f.C["m"] + torch.tensor(change, dtype=torch.float64)})
        with pytest.raises(StopIteration) as end:
            g.send(Trained(slots, 0.0, 1))
        sent, memory = transforms.pack(end.value.value[0], memory, t, client)
        arrived.append(transforms.unpack(sent).C["m"].tolist())
    assert arrived[0] == [[[9.0, 0.0], [0.0, 0.0]]]
    assert arrived[1] == [[[0.0, 0.0], [7.0, 0.0]]]
    assert arrived[2] == [[[0.0, 5.0], [0.0, 0.0]]]  # 4 and the 1 of round 1
    assert memory["C m"].tolist() == [[[0.0, 0.0], [2.0, 3.0]], [[0.0, 0.5], [0.0, 0.0]]]
