"""Every architecture gives what plain transformers and PEFT give for one text alone: in training, in prediction, and exported.

Which architectures there are to ask, and which are refused, is read from docs/models.md; that the page is right is asked first.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, ENCODER_DECODERS, uncovered
from models import sweep
from models.sweep import Elsewhere, Tried, off, off_most

from fedlora import methods
from fedlora.config import TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.runs.export import export
from fedlora.training.score import ScoreJob
from fedlora.types import SHARED, Model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ROWS = sweep.read(PAGE.read_text())
RUN = [name for name, row in ROWS.items() if f"| {sweep.REFUSED} |" not in row]
# In the fast suite: one or more of every form, of Conv1D, of experts, of layers that are shared, of positions after the padding's.
FAST = {
    *("albert", "bert", "bloom", "deberta-v2/shared", "distilbert", "fnet"),
    *("gpt2", "llama", "mixtral", "roberta", "t5", "xlnet"),
}
SIZES = (1, 7, 4)  # texts of each client
SGD = TrainConfig(batch_size=4, lr=0.05, weight_decay=0.01, optimizer="sgd")
ADAMW = TrainConfig(batch_size=4, lr=1e-3)
# One architecture of every form: packed encoder and decoder, padded, one client a pass, one length a pass, transposed weights,
# experts, shared layers.
FORMS = ("roberta", "llama", "bloom", "deberta-v2", "convbert", "gpt2", "mixtral", "albert")
FAMILIES = ("fedit", "lora-a2", "flora", "fedex-lora", "fedsa-lora")
TEXTS = sweep.texts((1, 2, 5, 9, 17, 30), 5)


def some_fast(names: Iterable[str], fast: Container[str] = FAST) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tried | BadInput]:
    """What became of an architecture, which is loaded and tried once."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda name: sweep.look(name, folder))


@pytest.fixture
def tried(name: str, found: Callable[[str], Tried | BadInput]) -> Tried:
    model = found(name)
    assert isinstance(model, Tried), model
    return model


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    with Elsewhere() as process:
        yield process


def test_every_architecture_is_in_the_sweep() -> None:
    assert uncovered() == set()
    assert list(ROWS) == [*ARCHITECTURES, *ENCODER_DECODERS] and len(RUN) >= 50


@pytest.mark.parametrize("name", some_fast(ROWS))
def test_the_page_says_what_is_found(name: str, found: Callable[[str], Tried | BadInput]) -> None:
    assert sweep.row(name, found(name)) == ROWS[name]


@pytest.mark.slow
def test_the_page_begins_as_it_is_made() -> None:
    assert PAGE.read_text().startswith(sweep.HEADING)


@pytest.fixture
def pool(tried: Tried) -> Encoded:
    """Texts of no letters, of one and of the most, of many other lengths, some of them equal; and one with special tokens in it."""
    lengths = [0, 1, sweep.LONGEST, *np.random.default_rng(1).integers(0, 60, 36).tolist()]
    return sweep.encoded(tried, [*sweep.texts(lengths, 3), "a[PAD]b[SEP]c[PAD]"])


@pytest.mark.parametrize("name", some_fast(RUN))
def test_texts_that_share_a_pass_give_the_logits_of_each_alone(tried: Tried, pool: Encoded) -> None:
    trainer, plain = sweep.make(tried, torch.float64, SGD), sweep.plain(tried, torch.float64)
    with sweep.calm(), sweep.doubled():
        want = sweep.alone(plain, pool)
        for first in (39, 35, 0):
            got = sweep.logits(trainer, Model(), pool.take(np.arange(first, 40)))
            assert off_most(got, want[first:]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_in_float32_too_and_as_many_a_pass_as_a_run_takes(tried: Tried, pool: Encoded) -> None:
    trainer, plain = sweep.make(tried, torch.float32, SGD, rows=2048), sweep.plain(tried, torch.float32)
    with sweep.calm():
        (got,) = trainer.outputs([ScoreJob(Model(), {}, pool)])
        assert off_most(torch.from_numpy(got), sweep.alone(plain, pool)) < 1e-5


def dealt(tried: Tried) -> dict[int, Encoded]:
    """Each client's texts, of zero to nineteen letters."""
    lengths = [np.random.default_rng(id).integers(0, 20, size).tolist() for id, size in enumerate(SIZES)]
    return {id: sweep.encoded(tried, sweep.texts(own, id)) for id, own in enumerate(lengths)}


def fedit_is_off(tried: Tried, settings: TrainConfig) -> float:
    """How far two rounds of FedIT are from the same by plain PEFT, over the whole change of the weights."""
    data, trainer, plain = dealt(tried), sweep.make(tried, torch.float64, settings), sweep.plain(tried, torch.float64)
    with sweep.calm(), sweep.doubled():
        want = sweep.plain_fedit(plain, sweep.start(trainer), data, settings, 2)
        (got,) = sweep.federate(trainer, "fedit", 2, data)
    return off(sweep.change(got), sweep.change(Model({SHARED: want})))


@pytest.mark.parametrize("name", some_fast(RUN))
def test_fedit_by_sgd_is_plain_peft(tried: Tried) -> None:
    assert fedit_is_off(tried, SGD) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_fedit_by_adamw_is_plain_peft(tried: Tried) -> None:
    """AdamW divides by the gradient's size: where a gradient is nothing but rounding, the step is, too. In float32 a few entries
    of some models are such; in float64 rounding is small beside AdamW's epsilon."""
    assert fedit_is_off(tried, ADAMW) < 1e-6


def exports_agree(tried: Tried, method: str, count: int, folder: Path, elsewhere: Elsewhere) -> None:
    """Adapter (or model, where no adapter can hold the result) and merged model of a run give in another process what predict
    gives here; of a personal method those of a client."""
    run = sweep.run(tried, method, count, folder)
    client = 1 if methods.find(method).FACTS.personal else None
    want, untouched = sweep.predicted(run, TEXTS, client)
    assert off_most(want, untouched) > 1e-2
    for merged in (False, True):
        to = folder / f"merged {merged}"
        with sweep.calm():
            export(run, to, client, merged)
        assert off_most(elsewhere.logits(to, TEXTS), want) < 1e-5, to.name


@pytest.mark.parametrize("name", some_fast(RUN, {"bert"}))
def test_exports_give_in_another_process_what_predict_gives(tried: Tried, tmp_path: Path, elsewhere: Elsewhere) -> None:
    exports_agree(tried, "fedit", 1, tmp_path, elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("name", FORMS)
def test_families_of_methods_are_exported(tried: Tried, method: str, tmp_path: Path, elsewhere: Elsewhere) -> None:
    exports_agree(tried, method, 2, tmp_path, elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("name", FORMS)
def test_families_of_methods_together_are_alone(tried: Tried, method: str) -> None:
    """Two rounds with the clients side by side, and with one after the other."""
    data = dealt(tried)
    with sweep.calm(), sweep.doubled():
        trainers = (sweep.make(tried, torch.float64, SGD, rows) for rows in (sweep.ALL, 0))
        together, alone = (sweep.federate(trainer, method, 2, data) for trainer in trainers)
    for one, other in zip(together, alone, strict=True):
        assert off(sweep.change(one), sweep.change(other)) < 1e-9
