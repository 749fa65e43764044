"""A perceptron for small images, as transformers has its models, so that it is saved, loaded and adapted like any other. Importing
this file makes it known to transformers' Auto classes."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput


class MLPConfig(PreTrainedConfig):  # type: ignore[misc]
    """Images (num_channels, *image_size) through `num_hidden_layers` layers of `hidden_size`."""

    model_type = "fedlora_mlp"
    num_channels: int = 1
    image_size: tuple[int, ...] | list[int] = (8, 8)
    hidden_size: int = 64
    num_hidden_layers: int = 2


class _MLP(PreTrainedModel):  # type: ignore[misc]
    """What both of the following share."""

    config_class = MLPConfig
    base_model_prefix = "mlp"
    main_input_name = "pixel_values"


class MLPModel(_MLP):
    """relu(W x + b), layer by layer."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        first = config.num_channels * math.prod(config.image_size)
        sizes = [first, *[config.hidden_size] * config.num_hidden_layers]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """(n, channels, height, width) -> hidden states (n, 1, hidden_size): one token an image."""
        hidden = pixel_values.flatten(1)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        return BaseModelOutput(last_hidden_state=hidden[:, None])


class MLPForImageClassification(_MLP):
    """The perceptron with a linear head."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        self.mlp = MLPModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
        """(n, channels, height, width) -> logits (n, num_labels)."""
        return ImageClassifierOutput(logits=self.classifier(self.mlp(pixel_values)[0][:, 0]))


AutoConfig.register(MLPConfig.model_type, MLPConfig, exist_ok=True)
AutoModel.register(MLPConfig, MLPModel, exist_ok=True)
AutoModelForImageClassification.register(MLPConfig, MLPForImageClassification, exist_ok=True)
