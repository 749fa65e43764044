"""Several data sets in one run: each is a domain of its own, over the union of their classes.

The classes of domain t are a range of the union, named "domain/label"; so are its strata. Clients are dealt domains in turn: with
T domains and h of them a client, client k holds domains k h, k h + 1, ..., k h + h - 1 modulo T, so no two domains differ by more
than one in how many clients they have. The examples of a domain, of every part, are then dealt to the clients that hold it as
those of a single data set are.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlora.config import ClientsConfig, DataConfig, Strata
from fedlora.data.dataset import Dataset, Domain, Integers, Schema, Split
from fedlora.data.partition import DEFAULT_COUNT, Parts, set_aside, split
from fedlora.errors import BadInput, some
from fedlora.seeds import derive

NONE = np.zeros(0, dtype=np.int64)


def union(datasets: Sequence[Dataset]) -> Dataset:
    """One data set of all, a domain each. BadInput when two have one name."""
    names = [dataset.name for dataset in datasets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"data.source: two sources are called '{twice}'; domains need different names, so rename a file or folder")
    shapes = {dataset.schema.shape for dataset in datasets}
    if len(shapes) > 1:
        raise BadInput(f"data.source: inputs of the sources differ in shape: {some([str(shape) for shape in sorted(shapes)])}")
    classes = _ranges(names, [dataset.schema.label_names for dataset in datasets])
    strata = _ranges(names, [dataset.strata_names for dataset in datasets])

    def joined(parts: Sequence[Split]) -> Split:
        return Split(
            tuple(x for part in parts for x in part.inputs),
            np.concatenate([part.targets + own.first for part, own in zip(parts, classes, strict=True)]),
            domains=np.repeat(np.arange(len(parts), dtype=np.int64), [len(part) for part in parts]),
            strata=np.concatenate([part.strata + own.first for part, own in zip(parts, strata, strict=True)]),
        )

    notes = [f"{dataset.name}: {note}" for dataset in datasets for note in dataset.notes]
    validation = [dataset.validation for dataset in datasets]
    if any(validation):
        notes += [f"{d.name}: no validation part, so the others alone choose the round" for d in datasets if d.validation is None]
    return Dataset(
        " + ".join(names),
        joined([dataset.train for dataset in datasets]),
        joined([dataset.test for dataset in datasets]),
        Schema(
            tuple(f"{d.name}/{label}" for d in datasets for label in d.schema.label_names),
            classes,
            shapes.pop(),
            tuple(scale for d in datasets for scale in d.schema.scales),
            tuple(prompt for d in datasets for prompt in d.schema.prompts),
        ),
        tuple(notes),
        strata,
        joined([part or dataset.train.take(NONE) for part, dataset in zip(validation, datasets, strict=True)])
        if any(validation)
        else None,
        tuple(f"{dataset.name}/{stratum}" for dataset in datasets for stratum in dataset.strata_names),
        datasets[0].strata_kind,
        datasets[0].things,
    )


def _ranges(domains: Sequence[str], names: Sequence[tuple[str, ...]]) -> tuple[Domain, ...]:
    """Each domain with the range that its own names have among those of all."""
    firsts = np.cumsum([0, *map(len, names)])
    return tuple(Domain(name, int(first), len(own)) for name, first, own in zip(domains, firsts, names, strict=False))


def held_domains(client: int, each: int, domains: int) -> list[int]:
    """Which domains a client is dealt, in order of the domains."""
    return sorted((client * each + j) % domains for j in range(each))


def deal(dataset: Dataset, data: DataConfig, clients: ClientsConfig, seed: int) -> Parts:
    """Who has what: `partition.split` for one domain, and for each of several among the clients that hold it; where domains are the
    strata, for all of them at once. The clients that are held out come last.

    Raises:
        BadInput: a domain that no client would hold, or that `partition.split` cannot deal, by name.
    """
    apart = dataset.domains and data.strata is not Strata.DOMAIN
    whole = _dealt(dataset, data, clients, seed) if apart else split(dataset, data, clients.count, seed)
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
        names = dataset.strata_names[domain.first : domain.first + domain.count]
        held = validation[0] if validation else None
        alone = replace(
            dataset, name=domain.name, train=train, test=test, validation=held, domains=(), strata_names=names, notes=()
        )
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
    own = examples.take(rows)
    return replace(own, domains=NONE, strata=own.strata - domain.first)
