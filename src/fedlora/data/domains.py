"""Several data sets in one run: each is a domain of its own, over the union of their classes.

The classes of domain t are a range of the union, named "domain/label". Clients are dealt domains in turn: with T domains and h of
them a client, client k holds domains k h, k h + 1, ..., k h + h - 1 modulo T, so no two domains differ by more than one in how many
clients they have. The examples of a domain, of every part, are then dealt to the clients that hold it as those of a single data
set are.
"""

from collections.abc import Sequence

import numpy as np

from fedlora.config import ClientsConfig, DataConfig
from fedlora.data.dataset import Dataset, Domain, Integers, Split
from fedlora.data.partition import DEFAULT_COUNT, Parts, set_aside, split
from fedlora.errors import BadInput
from fedlora.seeds import derive


def union(datasets: Sequence[Dataset]) -> Dataset:
    """One data set of all, a domain each. BadInput when two have one name."""
    names = [dataset.name for dataset in datasets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"data.source: two sources are called '{twice}'; domains need different names, so rename a file or folder")
    firsts = np.cumsum([0, *(len(dataset.label_names) for dataset in datasets)])
    domains = tuple(Domain(d.name, int(first), len(d.label_names)) for d, first in zip(datasets, firsts, strict=False))

    def joined(parts: Sequence[Split]) -> Split:
        return Split(
            tuple(text for part in parts for text in part.texts),
            np.concatenate([part.labels + domain.first for part, domain in zip(parts, domains, strict=True)]),
            domains=np.repeat(np.arange(len(parts), dtype=np.int64), [len(part) for part in parts]),
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
        domains,
        joined([part or Split((), np.zeros(0, dtype=np.int64)) for part in validation]) if any(validation) else None,
    )


def held_domains(client: int, each: int, domains: int) -> list[int]:
    """Which domains a client is dealt, in order of the domains."""
    return sorted((client * each + j) % domains for j in range(each))


def deal(dataset: Dataset, data: DataConfig, clients: ClientsConfig, seed: int) -> Parts:
    """Who has what: `partition.split` for one domain, and for each of several among the clients that hold it; the clients that are
    held out come last.

    Raises:
        BadInput: a domain that no client would hold, or that `partition.split` cannot deal, by name.
    """
    whole = _dealt(dataset, data, clients, seed) if dataset.domains else split(dataset, data, clients.count, seed)
    return set_aside(whole, clients.held_out, seed)


def _dealt(dataset: Dataset, data: DataConfig, clients: ClientsConfig, seed: int) -> Parts:
    """Of several domains."""
    domains = dataset.domains
    count = DEFAULT_COUNT if clients.count is None else clients.count
    if count * clients.domains < len(domains):
        raise BadInput(
            f"clients.count = {count}: {count} clients with clients.domains = {clients.domains} hold {count * clients.domains} "
            f"domains at most, and the run has {len(domains)}"
        )
    whole = [part for _, part in dataset.parts]
    pieces: list[list[list[Integers]]] = [[[] for _ in range(count)] for _ in whole]
    rule = ""
    for t, domain in enumerate(domains):
        holders = [k for k in range(count) if t in held_domains(k, clients.domains, len(domains))]
        rows = [np.flatnonzero(examples.domains == t) for examples in whole]
        train, test, *validation = (_only(examples, own, domain) for examples, own in zip(whole, rows, strict=True))
        names = dataset.label_names[domain.first : domain.first + domain.count]
        alone = Dataset(domain.name, train, test, names, validation=validation[0] if validation else None)
        try:
            parts = split(alone, data, len(holders), derive(seed, "task", domain.name))
        except BadInput as error:
            raise BadInput(f"domain '{domain.name}', held by {len(holders)} of {count} clients: {error}") from error
        dealt_parts = (parts.train, parts.test, parts.validation)[: len(whole)]
        for where, own, dealt in zip(pieces, rows, dealt_parts, strict=True):
            for k, mine in zip(holders, dealt, strict=True):
                where[k].append(own[mine])
        rule = f"{parts.rule}, {clients.domains} of {len(domains)} domains a client"
    joined = [tuple(np.concatenate(mine) for mine in where) for where in pieces]
    return Parts(joined[0], joined[1], tuple(f"client {k}" for k in range(count)), rule, joined[2] if joined[2:] else ())


def domain_counts(dataset: Dataset, rows: Integers) -> dict[str, int]:
    """How many of these training examples each domain has, of the domains that have any; nothing in a run of one domain."""
    if not dataset.domains:
        return {}
    numbers = np.bincount(dataset.train.domains[rows], minlength=len(dataset.domains))
    return {domain.name: int(n) for domain, n in zip(dataset.domains, numbers, strict=True) if n}


def _only(examples: Split, rows: Integers, domain: Domain) -> Split:
    return Split(tuple(examples.texts[row] for row in rows), examples.labels[rows] - domain.first)
