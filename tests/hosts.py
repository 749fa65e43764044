"""Hosts on one machine: network namespaces on a bridge, which have nothing but each other. Needs root and `ip`."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

HERE = os.geteuid() == 0 and shutil.which("ip") is not None
HUB = "10.99.0.1"


class Hosts:
    """A host `hub`, at HUB, and others by name; each is reached from the others until it is cut off."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.spaces = {name: f"fl{os.getpid()}{name}" for name in ("hub", *names)}

    def on(self, name: str) -> list[str]:
        """The words before a command that runs on a host."""
        return ["ip", "netns", "exec", self.spaces[name]]

    def cut(self, name: str) -> None:
        """Pull the cable of a host."""
        _ip("-n", self.spaces["hub"], "link", "set", f"to-{name}", "down")

    def join(self, name: str) -> None:
        """Plug it in again."""
        _ip("-n", self.spaces["hub"], "link", "set", f"to-{name}", "up")

    def make(self) -> None:
        hub = self.spaces["hub"]
        for space in self.spaces.values():
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "wire", "type", "bridge")
        _ip("-n", hub, "addr", "add", f"{HUB}/24", "dev", "wire")
        _ip("-n", hub, "link", "set", "wire", "up")
        for i, name in enumerate(self.names):
            _ip("-n", hub, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", self.spaces[name])
            _ip("-n", hub, "link", "set", f"to-{name}", "master", "wire", "up")
            _ip("-n", self.spaces[name], "addr", "add", f"10.99.0.{i + 2}/24", "dev", "eth0")
            _ip("-n", self.spaces[name], "link", "set", "eth0", "up")


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[Hosts]:
    """They are gone after the block."""
    found = Hosts(names)
    try:
        found.make()
        yield found
    finally:
        for space in found.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
