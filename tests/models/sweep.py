"""Every architecture of `architectures` as a tiny random model: what is found of it, and what plain transformers and PEFT make of
it.

What is asked of an architecture stands in test_sweep.py; here are its model in a folder, runs of ours, and the loops without
fedlora that they are compared with. As a program, this prints docs/models.md:

    python tests/models/sweep.py > docs/models.md
"""

import copy
import csv
import json
import re
import string
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

sys.path.append(str(Path(__file__).parents[1]))
import tiny
from architectures import ARCHITECTURES, CLS, ENCODER_DECODERS, LEFT_OUT, PAD, SEP, UNK, Architecture
from served import rounds

from fedlora import methods, seeds
from fedlora.clients.worker import Examples, Worker
from fedlora.config import HeadMode, TrainConfig, resolve
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.models.load import Pretrained
from fedlora.models.slots import transposed
from fedlora.models.trial import Findings
from fedlora.runs.export import read_result
from fedlora.runs.play import execute
from fedlora.runs.prepare import fresh_adapter, load_pretrained, make_task, make_trainer, rehearsed, try_pretrained
from fedlora.server.loop import Server
from fedlora.server.sampling import sampler
from fedlora.tasks.texts import encode
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job, batches
from fedlora.training.score import ScoreJob
from fedlora.transports.inprocess import InProcess
from fedlora.types import Client, Factors, Model, Setup, Train, own_model

CLASSES = ("apple", "banana", "cherry")
SPECIAL = {"[PAD]": PAD, "[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP}
LETTERS = string.ascii_letters + string.digits  # each is a token
LONGEST = 200  # letters of a text
CPU = torch.device("cpu")
ALL = 10**6  # tokens in one pass: everything at once
ALPHA, RANK, SEED = 4.0, 2, 0


# ---- a tiny model in a folder --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """An architecture's model in its folder, loaded, and what the trial found of it."""

    folder: Path
    pretrained: Pretrained
    findings: Findings


@contextmanager
def calm() -> Iterator[None]:
    """Without transformers' and PEFT's warnings: a new head, a missing CUDA kernel, a method that will be renamed do not matter
    here, and where warnings are errors the trial would find models that cannot be run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tokenizer(decoder: bool) -> Any:
    """A token a letter, which is how every class of tokenizer reads this vocabulary, whichever a model's type makes AutoTokenizer
    choose. An encoder's puts [CLS] and [SEP] around a text; a decoder's adds nothing, so a text can have no tokens."""
    letters = Tokenizer(BPE({token: id for id, token in enumerate([*SPECIAL, *LETTERS])}, merges=[], unk_token="[UNK]"))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    names = ("bos_token", "eos_token") if decoder else ("cls_token", "sep_token")
    if not decoder:
        letters.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, ("[CLS]", "[SEP]"), strict=True)),
    )


def save(architecture: Architecture, folder: Path) -> None:
    """Random weights, the same each time, and a tokenizer."""
    torch.manual_seed(0)
    with calm():
        transformers.AutoModelForSequenceClassification.from_config(architecture.config()).save_pretrained(folder)
    tokenizer(architecture.decoder).save_pretrained(folder)


def attempt(name: str, folder: Path) -> Tried:
    """Save the architecture's model in the folder and do with it what a run does before it trains. BadInput where it is refused."""
    save((ARCHITECTURES | ENCODER_DECODERS)[name], folder)
    config = resolve({"model": {"source": str(folder)}, "data": {"max_length": LONGEST + 2}, "device": "cpu", "precision": "fp32"})
    with calm():
        pretrained = tiny.load_model(config.model, CLASSES, config.seed)
        findings = rehearsed(config, pretrained, try_pretrained(config, pretrained))
    return Tried(folder, pretrained, findings)


def texts(lengths: Sequence[int], seed: int) -> list[str]:
    """Texts of so many random letters."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), n)) for n in lengths]


def encoded(tried: Tried, words: Sequence[str]) -> Encoded:
    """Texts as the run would have them, their labels by turns."""
    labels = np.arange(len(words)) % len(CLASSES)
    return encode(tried.pretrained.processor, words, labels, tried.findings.limit)


# ---- float64 -------------------------------------------------------------------------------------------------------------


class Doubled(TorchFunctionMode):
    """Whoever asks for float32 gets float64. Many models compute norms, rotations or a softmax in float32 whatever their own
    precision, and so hide all that lies below its rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **{name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()})


@contextmanager
def doubled() -> Iterator[None]:
    """Compute in float64 and in no lower precision. Models are made outside, for what they compute then, they keep."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Doubled():
            yield
    finally:
        torch.set_default_dtype(default)


def _fit(model: Any, dtype: torch.dtype) -> None:
    """Torch multiplies the experts of a mixture in one operation, which has no float64: there they come one by one."""
    if dtype is torch.float64:
        model.set_experts_implementation("eager")


# ---- ours ----------------------------------------------------------------------------------------------------------------


def make(tried: Tried, dtype: torch.dtype, settings: TrainConfig, rows: int = ALL) -> Trainer:
    """A trainer on a copy of the model, which fills a pass with so many tokens."""
    pretrained = copy.deepcopy(tried.pretrained)
    _fit(pretrained.model, dtype)
    settings = settings.model_copy(update={"rows": rows})
    return Trainer(pretrained, tried.findings.targets, settings, CPU, dtype, tiny.objective(), form=tried.findings.form)


def start(trainer: Trainer, rank: int = RANK) -> Factors:
    """The adapter that everybody starts from, in the trainer's precision."""
    f = fresh_adapter(trainer.shapes, SEED, {rank: ALPHA / rank}, rank)
    A, B = ({m: x.to(trainer.dtype) for m, x in f.role(role).items()} for role in ("A", "B"))
    return replace(f, A=A, B=B)


def federate(trainer: Trainer, method: str, count: int, data: Mapping[int, Encoded]) -> list[Model]:
    """The models after `count` rounds of a method: everybody's, or, where they are personal, each client's."""
    clients = tuple(Client(id, RANK, len(own)) for id, own in data.items())
    setup = Setup(
        trainer.shapes,
        trainer.params,
        clients,
        rounds=count,
        epochs=trainer.settings.epochs,
        seed=SEED,
        lora_alpha=ALPHA,
        rslora=False,
        fresh=lambda rank: start(trainer, rank),
        base=lambda m: trainer.base_weight(m).to(trainer.dtype),
        transposed=trainer.transposed,
        dtype=trainer.dtype,
    )
    made = methods.make(method, {})
    worker = Worker(made, setup, trainer, {id: Examples(own) for id, own in data.items()}, HeadMode.FROZEN)
    played = list(rounds(made, setup, Server(0, made.init(setup)), InProcess(worker), sampler(setup.clients, setup.seed, 1.0)))
    assert not any(tally.failed for _, tally, _ in played)
    server = played[-1][0]
    state = server.state
    if not made.FACTS.personal:
        return [made.deploy(state)]
    held = {client.id: worker.states.get(client.id, server.accepted[client.id]).held for client in clients}
    return [own_model(made, state, held[client.id], client, 2) for client in clients]


def logits(trainer: Trainer, model: Model, data: Encoded) -> Tensor:
    """Our logits of all texts in one go, in the precision that they are computed in."""
    with torch.no_grad():
        (found,) = trainer.forward.outputs([trainer.scorer.part(ScoreJob(model, {}, data))], {})
    return found


# ---- plain transformers and PEFT -----------------------------------------------------------------------------------------


def plain(tried: Tried, dtype: torch.dtype) -> Any:
    """The model as transformers alone loads it, with what the run drew from its seed."""
    with calm():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tried.folder, num_labels=len(CLASSES))
    for name in (*tried.pretrained.head, *tried.pretrained.drawn):
        model.get_parameter(name).data = tried.pretrained.model.get_parameter(name).data.clone()
    model.config.pad_token_id = tried.pretrained.model.config.pad_token_id
    _fit(model, dtype)
    return model.to(dtype).eval()


def one_text(model: Any, ids: np.ndarray) -> Tensor:
    """Plain logits of one text alone, without padding, (classes,)."""
    row = torch.from_numpy(ids.astype(np.int64))[None]
    found: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
    return found


def alone(model: Any, data: Encoded) -> Tensor:
    """Plain logits of every text, each in a pass of its own."""
    with torch.no_grad():
        return torch.stack([one_text(model, ids) for ids in data.inputs])


def adapt(model: Any, factors: Factors) -> Any:
    """The model with a PEFT adapter on the modules of the factors, which alone trains."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(factors.A),
        fan_in_fan_out=any(transposed(model.get_submodule(m)) for m in factors.A),
    )
    with calm():
        wrapped = peft.get_peft_model(model, config)
    return wrapped.to(next(iter(factors.A.values())).dtype).eval()


def put(wrapped: Any, factors: Factors) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Write the factors into the PEFT adapter; returns its own parameters, (A, B) by module."""
    pairs = {}
    for m in factors.A:
        layer = wrapped.base_model.model.get_submodule(m)
        pairs[m] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for parameter, value in zip(pairs[m], (factors.A[m], factors.B[m]), strict=True):
            parameter.data = value.clone()
    return pairs


def plain_client(wrapped: Any, factors: Factors, data: Encoded, settings: TrainConfig, seed: int) -> Factors:
    """One client's training by PEFT and torch's own optimiser, each text in a pass of its own."""
    pairs = put(wrapped, factors)
    parameters = [parameter for pair in pairs.values() for parameter in pair]
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    for where in batches(Job(Train({}, frozenset()), data, seed, {}), settings):
        optimizer.zero_grad()
        for i in where:
            label = torch.tensor(int(data.targets[i]))
            (cross_entropy(one_text(wrapped, data.inputs[i]), label) / len(where)).backward()
        optimizer.step()
    A, B = ({m: pair[i].detach().clone() for m, pair in pairs.items()} for i in (0, 1))
    return replace(factors, A=A, B=B)


def plain_fedit(model: Any, first: Factors, data: Mapping[int, Encoded], settings: TrainConfig, count: int) -> Factors:
    """FedIT by hand: client after client, then the means of A and of B, weighted by numbers of examples."""
    wrapped = adapt(model, first)
    total = sum(map(len, data.values()))
    for t in range(1, count + 1):
        done = {id: plain_client(wrapped, first, own, settings, seeds.derive(SEED, "train", t, id, 0)) for id, own in data.items()}
        A, B = ({m: sum(len(data[id]) / total * f.role(role)[m] for id, f in done.items()) for m in first.A} for role in ("A", "B"))
        first = replace(first, A=A, B=B)
    return first


def change(model: Model) -> Tensor:
    """What a model changes in the weights of its layers, slots and merged pairs and dense sums, all in one vector."""
    parts = [*model.slots.values(), *model.base.pairs]
    products = [{m: f.scale * (f.B[m].double() @ f.A[m].double()) for m in f.A} for f in parts]
    changes = [*products, model.base.dense]
    modules = sorted({m for each in changes for m in each})
    return torch.cat([sum(each[m].double() for each in changes if m in each).flatten() for m in modules])


def off(got: Tensor, wanted: Tensor) -> float:
    """How far the one is from the other, relative to it."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def off_most(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


# ---- a run, its exports, and another process -----------------------------------------------------------------------------


def run(tried: Tried, method: str, count: int, folder: Path) -> Path:
    """A whole run of two clients on twenty texts; returns its folder."""
    for part, size in (("train", 20), ("test", 6)):
        words = texts(np.random.default_rng(size).integers(1, 13, size).tolist(), size)
        with open(folder / f"{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((text, CLASSES[i % 3]) for i, text in enumerate(words))])
    config = resolve(
        {
            "device": "cpu",
            "precision": "fp32",
            "method": {"name": method},
            "model": {"source": str(tried.folder), "lora_alpha": ALPHA},
            "data": {"source": str(folder), "partition": "iid", "max_length": 32},
            "clients": {"count": 2, "rank": RANK},
            "train": {"rounds": count, "batch_size": 4, "lr": 2e-2},
        }
    )
    with calm():
        execute(config, folder / "run", False, tiny.Silent())
    return folder / "run"


def predicted(run: Path, words: Sequence[str], client: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits of texts by what `fedlora predict` makes of a run, and by the same without what was learned."""
    config, roster, result, head = read_result(run, client)
    with calm():
        pretrained = load_pretrained(config, roster.schema)
        findings = try_pretrained(config, pretrained)
        data = encode(pretrained.processor, words, np.zeros(len(words), dtype=np.int64), findings.limit)
        trainer = make_trainer(config, pretrained, findings, make_task(config).bind(roster.schema))
        learned, untouched = trainer.outputs([ScoreJob(result, head, data), ScoreJob(Model(), head, data)])
    return torch.from_numpy(learned), torch.from_numpy(untouched)


class Elsewhere:
    """A process that knows transformers and PEFT only, and loads what was exported with the code of its README."""

    PROGRAM = """
import json, os, re, sys
answers, sys.stdout = sys.stdout, sys.stderr
import peft, torch

def logits(folder, texts):
    os.chdir(folder)
    known = {}
    with torch.no_grad():
        exec(re.search("```python(.*?)```", open("README.md").read(), re.DOTALL)[1], known)
        alone = [known["tokenizer"](text, return_tensors="pt") for text in texts]
        return [known["model"](**text).logits[0].tolist() for text in alone]

for line in sys.stdin:
    try:
        answer = logits(*json.loads(line))
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), file=answers, flush=True)
"""

    def __enter__(self) -> Self:
        command = [sys.executable, "-c", self.PROGRAM]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()  # it has nothing to finish
        self.process.communicate()

    def logits(self, folder: Path, words: Sequence[str]) -> Tensor:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([str(folder), words]), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, list), answer
        return torch.tensor(answer)


# ---- docs/models.md ------------------------------------------------------------------------------------------------------

REFUSED = "refused"
HEADING = f"""# Models

Made by `python tests/models/sweep.py > docs/models.md`; do not edit. Every architecture with a sequence classifier in
transformers {transformers.__version__}, each as a tiny random model, with texts of up to {LONGEST} letters and, by PEFT
{peft.__version__}, adapters on all linear layers: which texts share a forward pass, whether clients do, and what a run says
of it. Whatever is not refused gives what plain transformers and PEFT give for one text alone: `tests/models/test_sweep.py`
holds it to that. After a slash stands a variant.

Not tried: {"; ".join(f"`{name}` {why}" for name, why in LEFT_OUT.items())}.

| architecture | texts | clients | why |
|---|---|---|---|
"""


def row(name: str, found: Tried | BadInput) -> str:
    """An architecture's row of the page."""
    if isinstance(found, BadInput):
        why = re.sub(r"^model\.source = '[^']*': ", "", str(found))  # the folder's name changes
        return f"| `{name}` | {REFUSED} | | {why} |"
    form, notes = found.findings.form, found.findings.notes
    return f"| `{name}` | {form.shared.value} | {'one a pass' if form.apart else 'together'} | {'; '.join(notes)} |"


def read(page: str) -> dict[str, str]:
    """Architecture -> its row of a page."""
    return {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}


def look(name: str, folder: Path) -> Tried | BadInput:
    """What becomes of an architecture, in a folder of its name."""
    own = folder / name.replace("/", ".")
    own.mkdir()
    try:
        return attempt(name, own)
    except BadInput as refusal:
        return refusal


def main() -> None:
    torch.set_num_threads(1)  # for sizes as small as these
    transformers.utils.logging.disable_progress_bar()
    print(HEADING, end="")
    with tempfile.TemporaryDirectory() as folder:
        for name in ARCHITECTURES | ENCODER_DECODERS:
            print(row(name, look(name, Path(folder))))


if __name__ == "__main__":
    main()
