"""What clients are dealt unequal shares of: classes, or whatever else splits a data set's examples into groups.

A stratum is a group of examples, by number; their names are the data set's `strata_names`.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from fedlora.config import Strata
from fedlora.data.dataset import Dataset, Integers, Split
from fedlora.errors import BadInput

BINS = 10  # strata of a quantity
LENGTHS = "lengths"


def bins(values: ArrayLike, known: ArrayLike, count: int = BINS) -> tuple[Integers, tuple[str, ...]]:
    """The bin (n,) of each value, and the bins' names. Edges are quantiles of `known` values, so that bins are equally full of
    these; fewer bins where many values are equal. Where `count` bins have room for all that differ, each has its own, to which
    others up to the next one belong."""
    distinct = np.unique(np.asarray(known, dtype=np.float64))
    if len(distinct) <= count:
        lows, names = distinct, tuple(f"{value:g}" for value in distinct)
    else:
        edges = np.unique(np.quantile(np.asarray(known, dtype=np.float64), np.linspace(0, 1, count + 1)))
        lows, names = edges[:-1], tuple(f"{low:g} to {high:g}" for low, high in pairwise(edges))
    found = np.clip(np.searchsorted(lows, np.asarray(values, dtype=np.float64), side="right") - 1, 0, None)
    return found.astype(np.int64), names


def in_characters(values: ArrayLike, known: ArrayLike) -> tuple[Integers, tuple[str, ...]]:
    """The same of lengths of texts, whose bins say what they count."""
    found, names = bins(values, known)
    return found, tuple(f"{name} chars" for name in names)


def by_column(dataset: Dataset, column: str) -> Dataset:
    """The values of a column, which the examples' owners are until now. BadInput where a part is without the column."""
    for name, part in dataset.parts:
        if len(part) and not part.owners:
            raise BadInput(f"data.strata = \"column\": the {name} part of {dataset.name} has no column '{column}'")
    names = sorted({owner for _, part in dataset.parts for owner in part.owners})
    number = {name: i for i, name in enumerate(names)}

    def stratified(part: Split) -> Split:
        return replace(part, owners=(), strata=np.array([number[owner] for owner in part.owners], dtype=np.int64))

    return _with(dataset, stratified, tuple(names), f"values of '{column}'")


def by_length(dataset: Dataset) -> Dataset:
    """How long inputs are: tenths of the training part, by characters of a text. What has them already stays as it is."""
    if dataset.strata_kind == LENGTHS:
        return dataset
    known = [len(x) for x in dataset.train.inputs]
    names = in_characters((), known)[1]
    return _with(dataset, lambda part: replace(part, strata=bins([len(x) for x in part.inputs], known)[0]), names, LENGTHS)


def by_domain(dataset: Dataset) -> Dataset:
    """The data sets of a run. BadInput where there is one."""
    if not dataset.domains:
        raise BadInput('data.strata = "domain" needs several sources: data.source lists one')
    names = tuple(domain.name for domain in dataset.domains)
    return _with(dataset, lambda part: replace(part, strata=part.domains), names, "domains")


def by_cluster(dataset: Dataset, features: Callable[[Split], np.ndarray], seed: int, count: int = BINS) -> Dataset:
    """Clusters (k-means) of what the pre-trained model makes of the training part; other parts go to the nearest.

    Args:
        features: of a part's examples, (n, d).
    """
    from sklearn.cluster import KMeans

    known = features(dataset.train).astype(np.float64)
    count = min(count, len(np.unique(known, axis=0)))
    means = KMeans(count, n_init=4, random_state=seed % 2**32).fit(known)

    def stratified(part: Split) -> Split:
        if not len(part):
            return part
        return replace(part, strata=means.predict(features(part).astype(np.float64)).astype(np.int64))

    return _with(dataset, stratified, tuple(f"cluster {i}" for i in range(count)), "clusters")


def of_source(dataset: Dataset, how: Strata, column: str | None) -> Dataset:
    """Of one source, by what is known when it is read; classes, domains and clusters are left to others."""
    if how is Strata.COLUMN:
        assert column is not None
        return by_column(dataset, column)
    return by_length(dataset) if how is Strata.LENGTH else dataset


def _with(dataset: Dataset, stratified: Callable[[Split], Split], names: tuple[str, ...], kind: str) -> Dataset:
    validation = None if dataset.validation is None else stratified(dataset.validation)
    train, test = stratified(dataset.train), stratified(dataset.test)
    return replace(dataset, train=train, test=test, validation=validation, strata_names=names, strata_kind=kind)
