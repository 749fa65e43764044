"""Shared by all tests: no network, and tiny models and data made on the spot."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights, saved with a tokenizer as transformers does."""
    return tiny.save_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def csv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv and test.csv: three classes that a word gives away."""
    return tiny.save_data(tmp_path_factory.mktemp("data"))
