"""A causal language model under PEFT: the loop of `peft_loop`, with transformers' own loss over the tokens that are trained."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.peers.peft_loop import Loop
from fedlora.data.encoded import Encoded
from fedlora.models.load import locate


def load(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The language model with transformers' own choice of attention, in evaluation mode, so without dropout; and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = locate(source)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class LanguageLoop(Loop):
    """One resident language model."""

    def loss(self, data: Encoded, where: np.ndarray) -> Tensor:
        batch = self._batch(data, where)
        marks = pad_sequence([torch.from_numpy(data.trained[i]) for i in where], batch_first=True).to(self.device)
        labels = batch["input_ids"].masked_fill(~marks, -100)
        with self._precision():
            loss: Tensor = self.model(**batch, labels=labels, use_cache=False).loss
        return loss
