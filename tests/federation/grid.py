"""A grid without Flower's processes: messages reach nodes at once, which answer as they are told to. Needs flwr."""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from fedlora.clients.node import Node
from fedlora.transports.flower.payload import bytes_of, content, lost, pack, unpack

ANYTHING = 1 << 40
Answering = Callable[[bytes], bytes]


class Stop(Exception):
    """The server is killed."""


class Played:
    """A node of the grid. `answer` makes a reply of what it was sent; `until` is how many looks the reply then takes."""

    def __init__(self, name: str, answer: Answering) -> None:
        self.name, self.answer, self.status, self.since, self.until = name, answer, "online", "1", 0
        self.asked: list[bytes] = []


class Grid:
    """
    Attributes:
        nodes: by their number.
        looks: after so many looks for replies the server is killed; None is never.
    """

    def __init__(self, nodes: dict[int, Played]) -> None:
        self.nodes, self.looks = nodes, None
        self.waiting: dict[str, tuple[int, Message]] = {}
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self._count = 0

    def get_nodes(self) -> Iterable[Any]:
        return [
            NodeInfo(node_id=id, status=node.status, last_activated_at=node.since, name=node.name)
            for id, node in self.nodes.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = self.nodes[message.metadata.dst_node_id]
            self._count += 1
            id = f"message {self._count}"
            ids.append(id)
            if node.status != "online":
                continue
            data = unpack(bytes_of(message.content), ANYTHING)
            node.asked.append(data)
            try:
                reply = node.answer(data)
            except LookupError:  # it says nothing
                continue
            self.waiting[id] = node.until, Message(content(reply), reply_to=message)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        if self.looks is not None:
            self.looks -= 1
            if self.looks < 0:
                raise Stop
        found = []
        for id in ids:
            if id in self.waiting:
                until, message = self.waiting[id]
                if until:
                    self.waiting[id] = until - 1, message
                else:
                    found.append(self.waiting.pop(id)[1])
        return found


def answering(node: Node) -> Answering:
    """As a client's own worker answers."""
    return lambda data: pack(node.answer(data))


def saying(why: str) -> Answering:
    return lambda data: lost(why)
