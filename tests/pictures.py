"""Images small enough to train on in a test, and a vision transformer as one from the Hub."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

CLASSES = ("dark", "light", "left")


def pixels(label: str, rng: np.random.Generator, size: int = 8, channels: int = 1) -> np.ndarray:
    """(size, size) or (size, size, 3) bytes: dark, light, or light on the left."""
    x = rng.integers(0, 60, (size, size, channels))
    x[:, : {"dark": 0, "light": size, "left": size // 2}[label]] += 180
    return x.astype(np.uint8).squeeze()


def png(x: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(x).save(out, "PNG")
    return out.getvalue()


def examples(count: int, seed: int, **options: int) -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(seed)
    labels = [CLASSES[i % 3] for i in range(count)]
    return [pixels(label, rng, **options) for label in labels], labels


def save_folder(folder: Path, train: int = 30, test: int = 15, **options: int) -> Path:
    """train/CLASS/*.png and test/CLASS/*.png."""
    for part, count, seed in (("train", train, 1), ("test", test, 2)):
        for i, (x, label) in enumerate(zip(*examples(count, seed, **options), strict=True)):
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(folder / part / label / f"{i:03}.png")
    return folder


def vit(size: int = 8, channels: int = 3, **changes: Any) -> Any:
    """The configuration of a small vision transformer."""
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "num_labels": 3}
    return transformers.ViTConfig(**common, image_size=size, patch_size=4, num_channels=channels, initializer_range=0.2, **changes)


def save_vit(folder: Path, config: Any = None, **processor: Any) -> Path:
    """Random weights without a classifier, and an image processor."""
    torch.manual_seed(0)
    config = config or vit()
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    sides = {"height": config.image_size, "width": config.image_size}
    transformers.ViTImageProcessorPil(size=sides, do_convert_rgb=True, **processor).save_pretrained(folder)
    return folder
