"""Workers on a Ray cluster, or on this machine by Ray: the one module that imports ray.

A worker is an actor with a share of the processors, or a GPU of its own. Replies stay in Ray's object store until they are read,
a bundle at a time; what a round sends to all is put there once.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import ray

from fedlora import wire
from fedlora.clients.serve import answered, bundles, classes, whole
from fedlora.clients.worker import Worker
from fedlora.errors import BadInput, first_line
from fedlora.messages import Unstarted
from fedlora.transports.pool import EACH, Gone, Heard, Peer
from fedlora.types import Reply

LOCAL = "local"  # the address of a Ray of our own
SOON = 5.0  # seconds in which a cluster's machine answers
AHEAD = 16  # bundles of a worker that may wait to be read
PASSED = ("HF_", "FEDLORA_", "TOKENIZERS_", "TRANSFORMERS_", "ONEDNN_")  # beginnings of environment variables that workers get


Make = Callable[[], AbstractContextManager[Worker]]


@dataclass(frozen=True)
class Share:
    """What each worker has: whole processors, which are its threads, and GPUs."""

    count: int
    cpus: int
    gpus: int = 0


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be connected to a cluster; without an address, to one on this machine that ends with the block. BadInput: it is not there."""
    own: dict[str, Any] = {"num_cpus": os.cpu_count(), "include_dashboard": False} if address is None else {}
    if address is not None and ":" in address:  # Ray itself would try for minutes
        host, _, port = address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), SOON) as reached:
                own = {"_node_ip_address": reached.getsockname()[0]}  # Ray itself would ask a server far away for the way
        except (OSError, ValueError) as error:
            raise BadInput(f"transport.address = '{address}': nobody answers there: {error}") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address or LOCAL, log_to_driver=False, logging_level="error", ignore_reinit_error=False, **own)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        what = "Ray does not start here" if address is None else f"transport.address = '{address}': there is no Ray cluster"
        why = first_line(error)
        if _wants_token(error):
            what = "Ray" if address is None else f"transport.address = '{address}'"
            why = "it wants a token; set RAY_AUTH_MODE=token, and have the cluster's in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        raise BadInput(f"{what}: {why}") from error
    finally:
        for number, handler in handlers.items():  # Ray has its own, which ends the process at once
            with suppress(ValueError, TypeError):  # not in the main thread
                signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def shares(wanted: int | None, most: int | None = None, name: str = "transport.workers") -> Share:
    """What each of several workers gets of the cluster: by default there is one for each GPU, or where there is none, one for every
    few processors.

    Args:
        wanted: how many.
        most: how many a machine without a GPU has by default, if it has so many processors.
        name: of what says how many.

    Raises:
        BadInput: the cluster has too little for them.
    """
    nodes = _machines()
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if gpus:
        if wanted is not None and wanted > gpus:
            raise BadInput(f"{name} = {wanted}: the cluster has {gpus} GPUs, one for each")
        count = wanted or gpus
        return Share(count, max(1, sum(cpus) // gpus), 1)
    count = wanted or max(1, sum(min(n, most) if most else n // EACH for n in cpus))
    fitting = [n for n in range(1, max(cpus, default=0) + 1) if sum(each // n for each in cpus) >= count]
    if not fitting:
        raise BadInput(f"{name} = {count}: the cluster has {sum(cpus)} processors")
    return Share(count, max(fitting))


def room(share: Share) -> int:
    """How many workers of this share the cluster holds, as it is now."""

    def of(machine: Mapping[str, float]) -> int:
        by_cpu = int(machine.get("CPU", 0) // share.cpus)
        return min(by_cpu, int(machine.get("GPU", 0) // share.gpus)) if share.gpus else by_cpu

    return sum(map(of, _machines()))


def _wants_token(error: BaseException | None) -> bool:
    """Whether Ray's authentication is among the reasons; newer versions have it by default where the machine has a token."""
    while error is not None:
        if "AuthenticationError" in f"{type(error).__name__} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False


def _machines() -> list[Mapping[str, float]]:
    """What each machine of the cluster has, of those that are there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@ray.remote
class Host:
    """A worker in its own process."""

    def __init__(self, make: Make, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._held = ExitStack()
        self._last: dict[int, tuple[str, Reply]] = {}
        try:
            self._worker: Worker | Unstarted = self._held.enter_context(make())
        except BadInput as error:
            self._worker = Unstarted(str(error))

    def answer(self, shared: bytes, own: bytes) -> Iterator[list[bytes]]:
        """The answers as they come."""
        if isinstance(self._worker, Unstarted):
            yield [wire.encode(self._worker)]
            return
        asks = whole(shared, own, classes(self._worker.method))
        yield from bundles(map(wire.encode, answered(self._worker, asks, self._last)))


class _Actor:
    """A worker as the driver has it. `heard` gets references to its answers."""

    def __init__(self, make: Make, share: Share, heard: Heard) -> None:
        self.alive = True
        self._heard = heard
        kind: Any = Host
        self._actor = kind.options(**_options(share), max_restarts=0).remote(make, share.cpus)

    def ask(self, shared: Any, own: bytes) -> None:
        method = self._actor.answer.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
        Thread(target=self._listen, args=(method.remote(shared, own),), daemon=True).start()

    def take(self, said: Any) -> Sequence[bytes]:
        try:
            found: list[bytes] = _got(said)
            return found
        except Gone:  # were it its own exception, the next ask would meet it again
            self.alive = False
            raise

    def stop(self) -> None:
        with suppress(Exception):
            ray.kill(self._actor)

    def _listen(self, answers: Any) -> None:
        try:
            for reference in answers:
                self._heard.put((self, reference))
        except Exception:  # as a rule what it met lies in the last reference, and is met there
            self.alive = False
            self._heard.put((self, None))


def starting(make: Callable[[int], Make], share: Share) -> Callable[[int, Heard], Peer]:
    """Starts workers. `make` gives, for a number, what makes the worker there: a function to import, and plain values."""
    return lambda number, heard: _Actor(make(number), share, heard)


once = ray.put  # bytes into the object store, where all workers find them
fetch = ray.get  # them, anywhere on the cluster; each machine fetches them once


def several() -> bool:
    """Whether the cluster has more machines than one."""
    return len(_machines()) > 1


class Task:
    """A task somewhere on the cluster that says what comes of it as it comes. `work` is a function to import."""

    def __init__(self, work: Callable[..., Iterator[Any]], values: tuple[Any, ...], share: Share) -> None:
        options = {"num_returns": "streaming", "max_retries": 0, "_generator_backpressure_num_objects": AHEAD}
        self._said: Any = ray.remote(work).options(**_options(share), **options).remote(*values)

    def __iter__(self) -> Iterator[Any]:
        """What it says. Gone: it failed, or its machine or process is lost."""
        try:
            for said in self._said:
                yield _got(said)
        except ray.exceptions.RayError as error:
            raise _gone(error) from error

    def stop(self) -> None:
        with suppress(Exception):
            ray.cancel(self._said, force=True)


def _options(share: Share) -> dict[str, Any]:
    """Of what runs with a share of the cluster, spread over its machines."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    return {
        "num_cpus": share.cpus,
        "num_gpus": share.gpus,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": passed},
    }


def _got(said: Any) -> Any:
    """What a reference stands for. Gone: there is none."""
    try:
        return ray.get(said)
    except ray.exceptions.RayError as error:
        raise _gone(error) from error


def _gone(error: Exception) -> Gone:
    if isinstance(error, ray.exceptions.RayTaskError):  # its own exception
        return Gone(f"failed: {first_line(error.cause)}")
    return Gone(f"died: {first_line(str(error).strip().rpartition(chr(10))[2])}")
