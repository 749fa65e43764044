"""Everything is in the package, which each machine has installed by itself."""

from fedlora.runs.federation.apps import client, server

__all__ = ["client", "server"]
