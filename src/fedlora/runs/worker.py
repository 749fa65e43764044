"""Workers elsewhere: other processes that play some clients of a run in a folder, and how a run reaches them. A process is
`python -m fedlora.runs.worker FOLDER NUMBER THREADS`."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock

from fedlora import wire
from fedlora.clients.serve import classes, serve, write
from fedlora.clients.worker import Worker
from fedlora.collector import settled
from fedlora.config import Config, read_run
from fedlora.data.given import KEPT
from fedlora.disk import digest, private, write_whole
from fedlora.errors import BadInput
from fedlora.listener import Listener, Quiet
from fedlora.messages import Transport, Unstarted
from fedlora.models.load import GIVEN, PACKAGED
from fedlora.names import counted
from fedlora.runs.connect import Connect, in_process, make_worker
from fedlora.runs.context import RunContext
from fedlora.runs.folder import check_roster
from fedlora.runs.packages import require
from fedlora.runs.prepare import prepare, with_source
from fedlora.runs.saved import STATES
from fedlora.transports.pool import EACH, Pool, balanced
from fedlora.transports.processes import starting

NO_BASE: Mapping[str, tuple[str, Any]] = MappingProxyType({})
FILES = ("config.toml", "federation.json")  # of a run's folder, which make its workers


@contextmanager
def reaching(config: Config) -> Iterator[Connect]:
    """Where the configuration says that clients are played, while they can be reached. BadInput: it cannot be there."""
    settings = config.transport
    if settings.name != "in_process" and (config.train.trainer is not None or config.model.source.startswith(GIVEN)):
        raise BadInput(
            f"transport.name = '{settings.name}': a model or trainers that are at hand in this process are in no other one; "
            "leave it out, or name the model by its folder"
        )
    if settings.address is not None and settings.name != "ray":
        raise BadInput(f"transport.address = '{settings.address}': that is of a Ray cluster; give transport.name = 'ray', too")
    if settings.workers is not None and settings.name == "in_process":
        raise BadInput(f"transport.workers = {settings.workers}: give transport.name = 'processes' or 'ray', too")
    if settings.name == "in_process":
        yield in_process
    elif settings.name == "processes":
        yield processes(settings.workers or max(1, (os.cpu_count() or 1) // EACH), 60 * settings.timeout)
    else:
        require(config)
        from fedlora.transports import ray

        with ray.cluster(settings.address):
            yield partial(_over_ray, ray.shares(settings.workers))


def processes(count: int, patience: float = 600.0, retries: int = 3) -> Connect:
    """Clients are played by so many processes, which share the folder of what clients keep, and the threads of this one."""

    threads = max(1, torch.get_num_threads() // count)

    def connect(context: RunContext, worker: Worker, out: Path, listener: Listener) -> Transport:
        def command(number: int) -> list[str]:
            return [sys.executable, "-m", "fedlora.runs.worker", str(out), str(1 + number), str(threads)]  # 0 is the server's own

        listener.stage(f"starting {counted(count, 'worker')}")
        numbers, known = _numbers(context, count), classes(context.method)
        return Pool(starting(command), count, numbers, known, retries, patience, listener.examples, listener.note)

    return connect


def _over_ray(share: Any, context: RunContext, worker: Worker, out: Path, listener: Listener) -> Transport:
    from fedlora.transports import ray

    files = {name: (out / name).read_bytes() for name in FILES}
    files |= {f"{KEPT}/{file.name}": file.read_bytes() for file in (out / KEPT).glob("*")}
    base = _sent(_of_model(context.config), ray.once) if ray.several() else {}
    listener.stage(f"starting {counted(share.count, 'worker')}")
    return Pool(
        ray.starting(lambda number: partial(made, str(out.resolve()), files, 1 + number, os.getcwd(), base, ray.fetch), share),
        share.count,
        _numbers(context, share.count),
        classes(context.method),
        patience=60 * context.config.transport.timeout,
        on_examples=listener.examples,
        note=listener.note,
        once=ray.once,
        room=partial(ray.room, share),
    )


def _numbers(context: RunContext, count: int) -> dict[int, int]:
    """Who plays which client, so that workers have as many tokens to train on."""
    return balanced({client.id: context.train[client.id].tokens for client in context.setup.clients}, count)


def _of_model(config: Config) -> list[Path]:
    """The files of a model in a folder here; of one from the Hub or a package there are none."""
    place = Path(config.model.source)
    if config.model.source in PACKAGED or not place.exists():
        return []
    return [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())


def _sent(files: Sequence[Path], once: Callable[[bytes], Any]) -> dict[str, tuple[str, Any]]:
    """Files by name: their digests, and where they have been put."""
    found = {}
    for file in files:
        data = file.read_bytes()
        found[file.name] = digest(data), once(data)
    return found


@contextmanager
def made(
    out: str,
    files: Mapping[str, bytes],
    number: int,
    cwd: str,
    base: Mapping[str, tuple[str, Any]] = NO_BASE,
    fetch: Callable[[Any], bytes] = bytes,
) -> Iterator[Worker]:
    """The worker of a number, on this machine, which may not be the server's: what clients keep then lies in a folder here.

    Args:
        out: the run's folder, where the server is.
        files: what the folder holds of the run's making.
        cwd: where relative paths begin.
        base: of a model in a folder there, its files' digests by name, and what `fetch` gets them by where no such folder is here.
    """
    if Path(cwd).is_dir():
        os.chdir(cwd)
    place = Path(out)
    if not all((place / name).is_file() and (place / name).read_bytes() == data for name, data in files.items()):
        key = blake2b(out.encode() + b"".join(files[name] for name in FILES), digest_size=8).hexdigest()
        place = private(key)
        (place / KEPT).mkdir(exist_ok=True)
        for name, data in files.items():
            write_whole(place / name, data)
    with _worker(place, _with_base(read_run(place), base, fetch), number) as worker:
        yield worker


def _with_base(config: Config, base: Mapping[str, tuple[str, Any]], fetch: Callable[[Any], bytes]) -> Config:
    """The configuration with the model where it is on this machine, which fetches it once."""
    source = Path(config.model.source)
    if not base or source.exists():
        return config
    key = "".join(f"{name} {its}\n" for name, (its, _) in sorted(base.items()))
    place = private(blake2b(key.encode(), digest_size=8).hexdigest())
    with FileLock(place / "fetched.lock"):
        for name, (_, where) in base.items():
            if not (place / name).exists():
                write_whole(place / name, fetch(where))
    found = place / source.name if list(base) == [source.name] else place
    return with_source(config, found)


@contextmanager
def _worker(out: Path, config: Config, number: int) -> Iterator[Worker]:
    """The only one of its number: one that outlived its server may not have noticed yet."""
    (out / STATES).mkdir(exist_ok=True)
    with FileLock(out / STATES / f"worker-{number}.lock"):
        context = prepare(config, Quiet(), out)
        context.trainer.rows = check_roster(context.roster, out)
        with settled():
            yield make_worker(context, out / STATES, number)


def main(out: Path, number: int, threads: int) -> None:
    """Answer asks from standard input until it ends."""
    torch.set_num_threads(threads)
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no message
        with ExitStack() as held:
            try:
                worker = held.enter_context(_worker(out, read_run(out), number))
            except BadInput as error:
                write(answers, wire.encode(Unstarted(str(error))))
                return
            serve(worker, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
