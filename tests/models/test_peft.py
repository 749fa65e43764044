"""What we export, loaded by PEFT and transformers themselves, gives the same logits."""

from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers

from fedlora.config import ModelConfig, TrainConfig
from fedlora.models.peft import is_adapter, save_adapter, save_model, stack
from fedlora.models.slots import find_targets
from fedlora.tasks.texts import encode
from fedlora.training.batched import Trainer
from fedlora.types import BaseUpdate, Factors, Mix, Model, Similarity

KINDS = ["bert", "roberta", "distilbert", "gpt2", "llama"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    return tiny.save_model(request.param, tmp_path_factory.mktemp(request.param))


def factors(shapes, rank: int, seed: int, scale: float, **extra) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return Factors(
        {m: torch.randn(rank, i, generator=g) * 0.3 for m, (_, i) in shapes.items()},
        {m: torch.randn(o, rank, generator=g) * 0.3 for m, (o, _) in shapes.items()},
        scale,
        **{name: {m: torch.randn(shape, generator=g) for m in shapes} for name, shape in extra.items()},
    )


def world(folder: Path):
    config = ModelConfig(source=str(folder))
    pretrained = tiny.load_model(config, tiny.CLASSES, seed=2)
    data = encode(pretrained.processor, tiny.examples(9, 0)[0], np.zeros(9, dtype=np.int64), 64)
    trainer = Trainer(
        pretrained,
        find_targets(pretrained.model, "all-linear"),
        TrainConfig(),
        torch.device("cpu"),
        torch.float32,
        tiny.objective(),
    )
    return config, trainer, data


def results(shapes) -> dict[str, Model]:
    wide = factors(shapes, 12, 4, 0.5)
    pair = factors(shapes, 8, 5, 1.0)
    return {
        "one slot": Model({"shared": factors(shapes, 3, 1, 2.0)}),
        "two slots, C and merged pairs, wider than the matrix": Model(
            {"shared": factors(shapes, 3, 1, 2.0, C=(3, 3)), "personal": factors(shapes, 2, 2, 0.7, C=(2,))},
            BaseUpdate(0, 2, (wide, pair)),
        ),
        "a fixed mix of slots": Model(
            {
                "shared": factors(shapes, 3, 1, 2.0),
                "off": factors(shapes, 2, 2, 0.7, C=(2,), D=(1,)),
                "own": factors(shapes, 2, 3, 0.5),
            },
            gate=Mix({"shared": 0.3, "off": 0.0, "own": 1.5}),
        ),
        "some modules only": Model({"shared": factors(dict(list(shapes.items())[:3]), 2, 6, 1.5)}),
    }


def logits(model, data) -> np.ndarray:
    model = model.eval()
    with torch.no_grad():
        return np.array([model(input_ids=torch.tensor(row.astype(np.int64))[None]).logits[0].tolist() for row in data.inputs])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_adapter_gives_the_same_logits_under_peft(folder: Path, which: int, tmp_path: Path) -> None:
    config, trainer, data = world(folder)
    result = list(results(trainer.shapes).values())[which]
    want = tiny.logits(trainer, result, {}, data)
    assert np.abs(want - tiny.logits(trainer, Model(), {}, data)).max() > 1e-2
    save_adapter(tiny.load_model(config, tiny.CLASSES, seed=2), result, tmp_path / "adapter")
    torch.manual_seed(99)  # the base gets some other random head
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    if base.config.pad_token_id is None:
        base.config.pad_token_id = 0
    np.testing.assert_allclose(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), data), want, atol=2e-4)


def test_merged_model_gives_the_same_logits(folder: Path, tmp_path: Path) -> None:
    config, trainer, data = world(folder)
    result = list(results(trainer.shapes).values())[1]
    g = torch.Generator().manual_seed(8)
    result = Model(result.slots, result.base, {n: 0.05 * torch.randn(s, generator=g) for n, s in list(trainer.params.items())[:6]})
    assert not is_adapter(result)
    want = tiny.logits(trainer, Model(result.slots, result.base), {}, data)
    save_model(tiny.load_model(config, tiny.CLASSES, seed=2), Model(result.slots, result.base), tmp_path / "model")
    got = logits(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"), data)
    np.testing.assert_allclose(got, want, atol=5e-4)


def test_a_stack_is_the_sum_and_no_wider_than_the_matrix() -> None:
    shapes = {"m": (10, 7)}
    one, two = factors(shapes, 5, 1, 2.0, C=(5, 5)), factors(shapes, 6, 2, 0.5, D=(10,))
    whole = stack(Model({"a": one, "b": two}))
    dense = 2.0 * one.B["m"] @ one.C["m"] @ one.A["m"] + 0.5 * two.D["m"][:, None] * (two.B["m"] @ two.A["m"])
    assert whole.A["m"].shape == (7, 7) and whole.scale == 1.0
    torch.testing.assert_close(whole.B["m"] @ whole.A["m"], dense, atol=1e-4, rtol=1e-4)


def test_what_depends_on_the_input_is_no_adapter() -> None:
    slots = {"shared": Factors(), "local": Factors()}
    assert is_adapter(Model(slots, gate=Mix({"local": 0.5})))
    assert not is_adapter(Model(slots, gate=Similarity("local", torch.ones(1, 2), 0.5)))
