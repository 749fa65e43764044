"""Whether every cell of a grid can run, found out before the first one starts and without loading a model's weights.

Of a cell is done what a run does before it trains: its method and transforms are made, its data is read and dealt, and the method
starts on the model's shapes. The model stands on torch's meta device, where a tensor has a shape and no values.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fedlora.comparison.grid import Cell, Grid
from fedlora.config import Config, DataConfig
from fedlora.data.dataset import Dataset
from fedlora.data.domains import deal
from fedlora.data.load import load as load_data
from fedlora.errors import BadInput
from fedlora.models.load import Pretrained, from_config, locate, refuse_encoder_decoder
from fedlora.models.slots import find_targets
from fedlora.runs.prepare import make_method, make_setup, require_validation
from fedlora.runs.roster import make_clients, make_held_out
from fedlora.training.batched import Trainer
from fedlora.training.precision import pick_device
from fedlora.transforms import pipeline


class _NeedsWeights(Exception):
    """A method's start came to where it reads the model's weights; what it may refuse after that, the run itself will say."""


def check(grid: Grid, cells: Iterable[Cell]) -> None:
    """Check cells of a grid; each data set and each model's configuration is read once.

    Raises:
        BadInput: the first cell that cannot run, and why.
    """
    datasets, outlines = cache(_dataset), cache(_outline)
    for cell in cells:
        try:
            _check(cell.config, datasets, outlines)
        except BadInput as error:
            raise BadInput(f"{grid.label(cell)}: {error}") from error


def _check(config: Config, datasets: Callable[[str, int], Dataset], outlines: Callable[[str, int], Pretrained]) -> None:
    method = make_method(config)
    pipeline.make(config.transform, method, config.seed, config.model.head)
    pick_device(config.device)
    undealt = DataConfig.model_fields.keys() - {"partition", "alpha", "min_size", "max_length"}
    dataset = datasets(config.data.model_dump_json(include=undealt | ({"partition"} if config.data.column else set())), config.seed)
    require_validation(config, dataset)
    parts = deal(dataset, config.data, config.clients, config.seed)
    clients = make_clients(config.clients, dataset, parts)
    make_held_out(config.clients, parts)
    outline = outlines(config.model.source, len(dataset.label_names))
    targets = find_targets(outline.model, config.model.target_modules)
    setup = make_setup(config, Trainer(outline, targets, config.train, torch.device("meta"), torch.float32), clients)
    with suppress(_NeedsWeights):
        method.init(replace(setup, base=_no_weights))


def _dataset(data: str, seed: int) -> Dataset:
    return load_data(DataConfig.model_validate_json(data), seed)


def _outline(source: str, num_labels: int) -> Pretrained:
    """The classifier's modules and parameters, without values."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(locate(source), num_labels=num_labels)
        refuse_encoder_decoder(f"model.source = '{source}'", config)
        with torch.device("meta"):
            return from_config(config, None, 0)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model.source = '{source}': {str(error).strip().partition(chr(10))[0]}") from error


def _no_weights(module: str) -> Tensor:
    raise _NeedsWeights(module)
