"""Several data sets in one run: each is a task of its own, over the union of their classes.

The classes of task t are a range of the union, named "task/label". Clients are dealt tasks in turn: with T tasks and h of them a
client, client k holds tasks k h, k h + 1, ..., k h + h - 1 modulo T, so no two tasks differ by more than one in how many clients
they have. The examples of a task, of every part, are then dealt to the clients that hold it as those of a single data set are.
"""

from collections.abc import Sequence

import numpy as np

from fedlora.config import ClientsConfig, DataConfig
from fedlora.data.dataset import Dataset, Integers, Split, Task
from fedlora.data.partition import DEFAULT_COUNT, Parts, split
from fedlora.errors import BadInput
from fedlora.seeds import derive


def union(datasets: Sequence[Dataset]) -> Dataset:
    """One data set of all, a task each. BadInput when two have one name."""
    names = [dataset.name for dataset in datasets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"data.source: two sources are called '{twice}'; tasks need different names, so rename a file or folder")
    firsts = np.cumsum([0, *(len(dataset.label_names) for dataset in datasets)])
    tasks = tuple(Task(d.name, int(first), len(d.label_names)) for d, first in zip(datasets, firsts, strict=False))

    def joined(parts: Sequence[Split]) -> Split:
        return Split(
            tuple(text for part in parts for text in part.texts),
            np.concatenate([part.labels + task.first for part, task in zip(parts, tasks, strict=True)]),
            tasks=np.repeat(np.arange(len(parts), dtype=np.int64), [len(part) for part in parts]),
        )

    notes = [f"{dataset.name}: {note}" for dataset in datasets for note in dataset.notes]
    validation = [dataset.validation for dataset in datasets]
    if any(validation):
        notes += [f"{d.name}: no validation part, so the others alone choose the round" for d in datasets if d.validation is None]
    return Dataset(
        " + ".join(names),
        joined([dataset.train for dataset in datasets]),
        joined([dataset.test for dataset in datasets]),
        tuple(f"{dataset.name}/{label}" for dataset in datasets for label in dataset.label_names),
        tuple(notes),
        tasks,
        joined([part or Split((), np.zeros(0, dtype=np.int64)) for part in validation]) if any(validation) else None,
    )


def held_tasks(client: int, each: int, tasks: int) -> list[int]:
    """Which tasks a client is dealt, in order of the tasks."""
    return sorted((client * each + j) % tasks for j in range(each))


def deal(dataset: Dataset, data: DataConfig, clients: ClientsConfig, seed: int) -> Parts:
    """Who has what: `partition.split` for one task, and for each of several among the clients that hold it.

    Raises:
        BadInput: a task that no client would hold, or that `partition.split` cannot deal, by name.
    """
    tasks = dataset.tasks
    if not tasks:
        return split(dataset, data, clients.count, seed)
    count = DEFAULT_COUNT if clients.count is None else clients.count
    if count * clients.tasks < len(tasks):
        raise BadInput(
            f"clients.count = {count}: {count} clients with clients.tasks = {clients.tasks} hold {count * clients.tasks} tasks "
            f"at most, and the run has {len(tasks)}"
        )
    whole = [part for _, part in dataset.parts]
    pieces: list[list[list[Integers]]] = [[[] for _ in range(count)] for _ in whole]
    rule = ""
    for t, task in enumerate(tasks):
        holders = [k for k in range(count) if t in held_tasks(k, clients.tasks, len(tasks))]
        rows = [np.flatnonzero(examples.tasks == t) for examples in whole]
        train, test, *validation = (_only(examples, own, task) for examples, own in zip(whole, rows, strict=True))
        names = dataset.label_names[task.first : task.first + task.count]
        alone = Dataset(task.name, train, test, names, validation=validation[0] if validation else None)
        try:
            parts = split(alone, data, len(holders), derive(seed, "task", task.name))
        except BadInput as error:
            raise BadInput(f"task '{task.name}', held by {len(holders)} of {count} clients: {error}") from error
        dealt_parts = (parts.train, parts.test, parts.validation)[: len(whole)]
        for where, own, dealt in zip(pieces, rows, dealt_parts, strict=True):
            for k, mine in zip(holders, dealt, strict=True):
                where[k].append(own[mine])
        rule = f"{parts.rule}, {clients.tasks} of {len(tasks)} tasks a client"
    joined = [tuple(np.concatenate(mine) for mine in where) for where in pieces]
    return Parts(joined[0], joined[1], tuple(f"client {k}" for k in range(count)), rule, joined[2] if joined[2:] else ())


def task_counts(dataset: Dataset, rows: Integers) -> dict[str, int]:
    """How many of these training examples each task has, of the tasks that have any; nothing in a run of one task."""
    if not dataset.tasks:
        return {}
    numbers = np.bincount(dataset.train.tasks[rows], minlength=len(dataset.tasks))
    return {task.name: int(n) for task, n in zip(dataset.tasks, numbers, strict=True) if n}


def _only(examples: Split, rows: Integers, task: Task) -> Split:
    return Split(tuple(examples.texts[row] for row in rows), examples.labels[rows] - task.first)
