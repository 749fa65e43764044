"""Whether every cell of a grid can run, found out before the first one starts and without loading a model's weights.

Of a cell is done what a run does before it trains: its method and transforms are made, its data is read and dealt, and the method
starts on the model's shapes. The model stands on torch's meta device, where a tensor has a shape and no values.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedlora.comparison.grid import Cell, Grid
from fedlora.config import Config, DataConfig, Strata
from fedlora.data.dataset import Dataset, Schema
from fedlora.data.domains import deal
from fedlora.data.load import load as load_data
from fedlora.errors import BadInput
from fedlora.models.load import Pretrained
from fedlora.models.slots import find_targets
from fedlora.report.runs import published_row
from fedlora.runs.packages import require_trackers
from fedlora.runs.prepare import make_method, make_setup, make_task, refuse_unserved, require_validation
from fedlora.runs.roster import make_clients, make_held_out
from fedlora.training.batched import Trainer
from fedlora.training.precision import pick_device
from fedlora.transforms import pipeline


class _NeedsWeights(Exception):
    """A method's start came to where it reads the model's weights; what it may refuse after that, the run itself will say."""


def check(grid: Grid, cells: Iterable[Cell], published: Sequence[Mapping[str, Any]] = ()) -> None:
    """Check cells of a grid, and that what was published for them is a score of theirs; each data set and each model's
    configuration is read once.

    Raises:
        BadInput: the first cell that cannot run, and why.
    """
    datasets, outlines = cache(_dataset), cache(_outline)
    for cell in cells:
        try:
            _check(cell.config, datasets, outlines, published_row(published, cell.config))
        except BadInput as error:
            raise BadInput(f"{grid.label(cell)}: {error}") from error


def _check(
    config: Config,
    datasets: Callable[[str], Dataset],
    outlines: Callable[[str, Schema], Pretrained],
    published: Mapping[str, Any] | None,
) -> None:
    require_trackers(config)
    task, method = make_task(config), make_method(config)
    pipeline.make(config.transform, method, config.seed, config.model.head)
    refuse_unserved(config, task)
    pick_device(config.device)
    undealt = DataConfig.model_fields.keys() - {"partition", "alpha", "min_size", "max_length"}
    own = undealt | ({"partition"} if config.data.column else set())
    dataset = datasets(config.model_dump_json(include={"seed": True, "task": True, "data": own}))
    require_validation(config, dataset)
    objective = task.bind(dataset.schema)
    if published is not None and (name := objective.metrics[0].name) not in published:
        raise BadInput(f"the published numbers have no column '{name}', by which its runs are compared")
    if config.data.strata is Strata.CLUSTER:
        return  # who has what is known when the model is loaded
    parts = deal(dataset, config.data, config.clients, config.seed)
    clients = make_clients(config.clients, dataset, parts)
    make_held_out(config.clients, parts)
    outline = outlines(config.model_dump_json(include={"task": True, "model": {"source"}}), dataset.schema)
    targets = find_targets(outline.model, config.model.target_modules)
    meta = Trainer(outline, targets, config.train, torch.device("meta"), torch.float32, objective)
    with suppress(_NeedsWeights):
        method.init(replace(make_setup(config, meta, clients), base=_no_weights))


def _dataset(tables: str) -> Dataset:
    config = Config.model_validate_json(tables)
    return load_data(make_task(config), config.data, config.seed)


def _outline(tables: str, schema: Schema) -> Pretrained:
    config = Config.model_validate_json(tables)
    return make_task(config).outline(config.model, schema)


def _no_weights(module: str) -> Tensor:
    raise _NeedsWeights(module)
