"""The words that methods, server and clients share. Frozen values only: nothing here trains, sends or stores.

Shapes: r is a rank, d_in and d_out a module's sizes. ``Tensors`` maps a module's path in the model to a tensor, and a role that
is not in a message is an empty mapping. Every adapted module m computes

    y = W x + b + sum over slots s of  g_s * scale_s * D_s * (B_s C_s A_s x)

with A (r, d_in), B (d_out, r), and, where a method has them, C (r, r) or its diagonal (r,), and D (d_out,) or (1,). g_s is 1 unless
a gate says otherwise.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fedlora.errors import BadInput

Tensors = Mapping[str, Tensor]
Role = tuple[str, str]  # (slot, role): ("shared", "B"), ("personal", "A"), (BASE, "W")
Masks = Mapping[Role, Tensors]  # what may move: True or 1; broadcasts, so a mask of ranks is one row or column

SHARED = "shared"  # the slot of every method that has one slot
BASE = "base"  # the reserved slot whose role "W" is the model's own parameters
FULL: frozenset[Role] = frozenset({(BASE, "W")})
GATE = "gate"  # the reserved slot whose role "G" is a trained router


# ---- what a model holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """One slot of every module: dW[m] = scale * D[m] * B[m] C[m] A[m]. An absent C or D counts as 1."""

    A: Tensors = field(default_factory=dict)
    B: Tensors = field(default_factory=dict)
    scale: float = 1.0
    C: Tensors = field(default_factory=dict)
    D: Tensors = field(default_factory=dict)

    def role(self, name: str) -> Tensors:
        """The tensors of role "A", "B", "C" or "D"."""
        tensors: Tensors = getattr(self, name)
        return tensors

    def with_role(self, name: str, tensors: Tensors) -> "Factors":
        """The same slot with one role replaced."""
        changes: dict[str, Any] = {name: tensors}
        return replace(self, **changes)

    def first(self, rank: int) -> "Factors":
        """The first `rank` ranks of A and B, at the same scale."""
        return replace(self, A={m: A[:rank] for m, A in self.A.items()}, B={m: B[:, :rank] for m, B in self.B.items()})

    def left(self, m: str) -> Tensor:
        """scale * D B C of one module, in float64, (d_out, r): what stands left of A."""
        B = self.B[m].to(torch.float64) * self.scale
        if m in self.C:
            B = B @ self.C[m].to(B.dtype) if self.C[m].ndim == 2 else B * self.C[m]
        return B * self.D[m][:, None] if m in self.D else B


ROLES = ("A", "B", "C", "D")
Slots = Mapping[str, Factors]


@dataclass(frozen=True)
class Mix:
    """A gate that weighs each slot by a number, the same for every input; a slot that is not named counts in full."""

    weights: Mapping[str, float]


@dataclass(frozen=True)
class Router:
    """FedLEASE's gate, one in every module: with M experts, the logits G x of 2M - 1 places, M of them the own expert's and one
    each of the others'; softmax; the M best places weigh their experts, renormalised to sum 1 when `renormalise`.

    Attributes:
        G: module -> (2M - 1, d_in); it trains under the role (GATE, "G").
        own: the slot of the client's own expert, places 0 to M - 1.
        others: the slots of the other experts, in order, places M to 2M - 2.
    """

    G: Tensors
    own: str
    others: tuple[str, ...]
    renormalise: bool = True


@dataclass(frozen=True)
class Similarity:
    """FedDPA's gate at inference: for each input, `slot` weighs a and every other slot 1 - a, where a is cap times the mean cosine
    of the input's features to the rows of `anchors` (count, d): from -cap to cap. Features are of the pool "mean" (see
    `Observe`)."""

    slot: str
    anchors: Tensor
    cap: float


@dataclass(frozen=True)
class ByDomain:
    """A gate for evaluation: an example passes through the slot of its domain alone, and through none where its domain has none.

    Attributes:
        slots: domain -> the name of its slot.
    """

    slots: Mapping[str, str]


Gate = Mix | Router | Similarity | ByDomain


@dataclass(frozen=True)
class BaseUpdate:
    """What takes W from version `since` to `version`.

    `pairs` holds one Factors a version; `dense`, when not empty, is instead the whole change since version 0, which is sent where
    the pairs that are missing outweigh it. A base that is not at `since` is topped up by the server, never guessed.
    """

    since: int = 0
    version: int = 0
    pairs: tuple[Factors, ...] = ()
    dense: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model to evaluate or export: slots on a base, whose parameters changed by `base` (merged pairs) and `full`
    (parameter name -> change from the pre-trained value). With `drop_base` the target modules' pre-trained weights count as zero;
    what was merged into them stays."""

    slots: Slots = field(default_factory=dict)
    base: BaseUpdate = BaseUpdate()
    full: Tensors = field(default_factory=dict)
    gate: Gate | None = None
    drop_base: bool = False


# ---- what everybody knows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """What the server may know of a client. `num_examples` counts its training examples; `domains` does so by domain, and is
    empty where the run has one domain."""

    id: int
    rank: int
    num_examples: int
    domains: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What the seed and the run give everybody, so it never travels.

    Attributes:
        shapes: module -> (d_out, d_in).
        params: parameter name -> shape, of everything that full fine-tuning trains (not the head).
        clients: every client of the run, by id. A client's own setup holds itself alone.
        all_ranks: the ranks that clients of the run have, each once, in order; of `clients` where it is not given.
        rounds, epochs: the length of the run, and of a client's training in a round: local passes, each an epoch or, where the run
            counts steps, so many of these (see `training.length`).
        seed: the run's seed; derive every draw from it by purpose.
        lora_alpha, rslora: LoRA's own alpha, and whether to scale by alpha/sqrt(r).
        fresh: rank -> the starting adapter: A Kaiming-uniform, B zero. Ranks are nested: fresh(2).A is fresh(4).A[:2].
        base: module -> its pre-trained weight, (d_out, d_in) in fp32, read when asked for.
        transposed: the modules whose own weight parameter is stored the other way round, (d_in, d_out), as GPT-2's are.
        dtype: of adapters, states and what is aggregated; a reply in another one is converted when it comes in.
    """

    shapes: Mapping[str, tuple[int, int]]
    params: Mapping[str, tuple[int, ...]]
    clients: tuple[Client, ...]
    rounds: int
    epochs: int
    seed: int
    lora_alpha: float
    rslora: bool
    fresh: Callable[[int], Factors]
    base: Callable[[str], Tensor]
    transposed: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32
    all_ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.all_ranks:
            object.__setattr__(self, "all_ranks", tuple(sorted({client.rank for client in self.clients})))

    def scaling(self, rank: int) -> float:
        """s in W + s*BA: alpha/r, or alpha/sqrt(r) with rsLoRA (2312.03732). The one scale rule of the package."""
        return self.lora_alpha / (rank**0.5 if self.rslora else rank)

    @property
    def ranks(self) -> dict[int, int]:
        """Client id -> its rank budget."""
        return {client.id: client.rank for client in self.clients}


# ---- what a client is asked to do --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TailNorm:
    """HetLoRA's penalty: weight * sum over modules of ||B[:, first:]||_F * ||A[first:, :]||_F of the slot."""

    slot: str
    first: int
    weight: float


@dataclass(frozen=True)
class ProductDecay:
    """FedHM's decay of a factorised weight as a whole: weight * sum over modules of ||B A||_F^2 of the slot."""

    slot: str
    weight: float


Penalty = TailNorm | ProductDecay


@dataclass(frozen=True)
class Train:
    """Train these roles of these slots from here, with a fresh optimiser.

    Attributes:
        slots: every slot of the forward pass, trained or not.
        roles: the (slot, role) pairs that move.
        epochs, max_steps: how many local passes; None is the run's own number of them, and no limit of steps.
        mask: (slot, role) -> module -> what may move; the rest stays bit-identical, weight decay included. A masked
            gradient is zero before clipping sees it.
        lr_scale: role -> factor on the run's learning rate.
        penalty: added to the loss of every step.
        base: the base updates that this client needs before it trains.
        full: parameter name -> change from the pre-trained value, to start from; absent counts as zero.
        gate: what weighs the slots; a Router trains where roles has (GATE, "G").
        data: the domain whose examples to train on; "" is all that the client has.
        drop_base: the target modules' pre-trained weights count as zero (a factorised model).
        probe: a rehearsal whose result is read but not kept: a head that trains along goes back to where it was.
        want_grad: also return the mean gradient over the steps.
    """

    slots: Slots
    roles: frozenset[Role]
    epochs: int | None = None
    max_steps: int | None = None
    mask: Masks = field(default_factory=dict)
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    penalty: Penalty | None = None
    base: BaseUpdate = BaseUpdate()
    full: Tensors = field(default_factory=dict)
    gate: Gate | None = None
    data: str = ""
    drop_base: bool = False
    probe: bool = False
    want_grad: bool = False


@dataclass(frozen=True)
class Trained:
    """The answer to a Train: the slots and the gate with their trained roles replaced, the mean training loss by example, the
    number of optimiser steps, `full` as in the request, and the mean gradient where it was wanted."""

    slots: Slots
    loss: float
    num_steps: int
    full: Tensors = field(default_factory=dict)
    grad: Masks = field(default_factory=dict)
    gate: Gate | None = None


@dataclass(frozen=True)
class ClassMixtures:
    """For every class of which the client has at least two examples, a Gaussian mixture with diagonal covariance of their
    features. Observed as "labels" (c,), "counts" (c,), "weights" (c, k), "means" (c, k, d) and "variances" (c, k, d); a class
    with fewer examples than components has zero weights for the rest."""

    components: int = 3


@dataclass(frozen=True)
class Features:
    """Features of `count` examples, drawn by seed (all, where there are fewer). Observed as "features" (count, d)."""

    count: int


Statistic = ClassMixtures | Features
Pool = Literal["first", "mean"]


@dataclass(frozen=True)
class Observe:
    """A statistic of the client's own data that a paper's server or gate needs. The features of a text are of the last hidden state
    of the pre-trained model without any slot, (d,) in fp32.

    Attributes:
        data: the domain whose examples it is of; "" is all that the client has.
        pool: "mean" over the text's tokens; "first" is the first token's, [CLS], of a model whose tokenizer begins every text with
            it and whose first token sees the rest of the text. Other models, such as decoders, have none: the mean again.
    """

    statistic: Statistic
    data: str = ""
    pool: Pool = "mean"


@dataclass(frozen=True)
class Observed:
    """The answer to an Observe: tensors by name, as the statistic says."""

    tensors: Tensors


# A method knows what it asked for, so what it is sent is Trained after Train, Observed after Observe.
Local = Generator[Train | Observe, Any, tuple[Any, Any]]


# ---- messages ----------------------------------------------------------------------------------------------------------


def _declared(kind: str, dims: tuple[str, ...]) -> Any:
    return field(default_factory=dict, metadata={"kind": kind, "dims": dims})


def value(*dims: str) -> Any:
    """A field of an Up that carries weights as they are. Transforms that act on changes refuse it.

    `dims` names each axis, and replies are checked against it: "out" and "in" are the module's sizes, "rank" the client's
    budget, "*" the whole shape of a parameter; other names come from `Facts.dims`, or must only agree within a module.
    """
    return _declared("value", dims)


def change(*dims: str) -> Any:
    """A field of an Up that carries what local training changed: what clipping, noise and compression may act on."""
    return _declared("change", dims)


def index(size: str, length: str) -> Any:
    """A field of an Up that says which entries of an axis of `length` the other fields hold: a bool mask with `size` True.

    A length such as "rank*in" is that of two axes together: a flat mask over a whole factor, row by row.
    """
    return _declared("index", (size, length))


def statistic(**dims: tuple[str, ...]) -> Any:
    """A field of an Up that carries a statistic of the client's data: these names, or none of them, and the axes of each. Axes of
    one name agree within the field, or with `Facts.dims`."""
    return field(default_factory=dict, metadata={"kind": "statistic", "dims": dims})


def declared(up: Any) -> dict[str, tuple[str, Any]]:
    """Field of an Up -> its kind and its dims, of those that are declared by the four above."""
    return {f.name: (f.metadata["kind"], f.metadata["dims"]) for f in fields(up) if "kind" in f.metadata}


@dataclass(frozen=True)
class Nothing:
    """The Up of a client that has nothing to say in this round, where `Facts.silent` allows it."""


@dataclass(frozen=True)
class Unfit:
    """The Up of a client that has no result this round, and why: it counts as failed, and keeps what it had."""

    reason: str


@dataclass(frozen=True)
class Reply:
    """What it answers. `up` is the method's own message, Nothing or Unfit; `loss` is the mean training loss by example of its last
    training request that is no probe."""

    client: Client
    up: Any
    head: Tensors = field(default_factory=dict)
    loss: float = 0.0
    num_steps: int = 0


# ---- methods -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a method claims; `tests/methods/cases.py` holds it to each of them.

    Attributes:
        title, paper, year: the method's name, its arXiv id (its venue where there is none), the year of the first version.
        exact: the server's update equals sum_k p_k s_k B_k A_k in every round.
        mixed_ranks: clients may have different ranks.
        personal: clients end with different models.
        upload, download: what one client sends and receives in a round, in parameters, as a formula.
        server: the cost of one aggregation for one module.
        dims: (method, setup, client) -> axis name -> its size, the range that it may lie in, or its size by module (see `value`).
        budget: (method, setup, client) -> axes -> the most that their sizes may sum to over all modules.
        sends: (method, state, client, round) -> the fields of an Up that this client's answer in this round fills, where that is
            not all of them. It must fill each `value`, `change` and `index` among them, and no other field.
        silent: there may be rounds in which clients train but send Nothing.
        asks: what its requests use, of "mask", "probe", "base", "full", "gate", "C", "D", "penalty", "grad", "domains" (a request
            for one of several data sets), "slots" (more than one), "drop_base" and "classes" (statistics of each).
        spares: method -> what of that it does not use with its settings.
        linear: (method, setup, round) -> whether aggregate makes of the Ups what it makes of as many copies of their lifted mean
            (see `fedlora.gather.lifted`).
        weight: (method, client) -> what an Up counts in that mean.
        holders: the mean of an entry is over the Ups that reach as far along the axis "rank", not over all.
    """

    title: str
    paper: str
    year: int
    exact: bool
    mixed_ranks: bool
    personal: bool
    upload: str
    download: str
    server: str
    dims: Callable[[Any, Setup, Client], Mapping[str, int | range | Mapping[str, int]]] = lambda method, setup, client: {}
    budget: Callable[[Any, Setup, Client], Mapping[tuple[str, ...], int]] = lambda method, setup, client: {}
    sends: Callable[[Any, Any, Client, int], frozenset[str]] | None = None
    silent: bool = False
    asks: frozenset[str] = frozenset()
    spares: Callable[[Any], frozenset[str]] = lambda method: frozenset()
    linear: Callable[[Any, Setup, int], bool] = lambda method, setup, round: False
    weight: Callable[[Any, Client], float] = lambda method, client: client.num_examples
    holders: bool = False


Diagnostics = Mapping[str, Any]


class Method(Protocol):
    """A federated LoRA method: a frozen dataclass whose fields are its hyper-parameters, with these functions of values. State,
    Down, Up and held are frozen dataclasses (or mappings, or None) of tensors and plain values.

    `round` is the number of rounds that were aggregated before, plus one, everywhere: an attempt without any reply does not count.
    """

    FACTS: ClassVar[Facts]

    def init(self, setup: Setup) -> Any:
        """What the server knows before round 1. Raises BadInput when the run asks for what the method cannot do."""

    def hold(self, setup: Setup, client: Client) -> Any:
        """What a client keeps from the start: made on the client, never sent. It must not depend on the other clients of the setup:
        a client in another process knows none of them."""

    def send(self, state: Any, client: Client, round: int, since: int | None = None) -> Any:
        """What this client receives this round.

        Args:
            since: None where the client has what the state says that it was sent. Otherwise its base is at this version, and all
                else that it was ever sent is gone, so it is sent again; what it holds it may still have. All values of `since` lead
                to the same Up.
        """

    def local(self, down: Any, held: Any, client: Client, round: int) -> Local:
        """What the client does: yields Train requests, returns (Up, held)."""

    def aggregate(self, state: Any, replies: Iterator[Reply], round: int) -> tuple[Any, Diagnostics]:
        """How the server combines. `replies` is one pass over at least one reply, in order of client id."""

    def deploy(self, state: Any) -> Model:
        """The common model, to evaluate and export: also that of a client which has never taken part."""


class PersonalMethod(Method, Protocol):
    """A method with `FACTS.personal`: each client that has taken part has a model of its own."""

    def own(self, down: Any, held: Any, client: Client) -> Model:
        """The client's model, of what it was sent (with since = 0) and what it holds."""


def asks_of(method: Any) -> frozenset[str]:
    """What the requests of a method use with its settings, in the words of `Facts.asks`."""
    facts: Facts = method.FACTS
    return facts.asks - facts.spares(method)


def own_model(method: Any, state: Any, held: Any, client: Client, round: int) -> Model:
    """The model of a client that has taken part. `round` is the number of rounds that were aggregated, plus one."""
    if not method.FACTS.personal:
        common: Model = method.deploy(state)
        return common
    own: Model = method.own(method.send(state, client, round, since=0), held, client)
    return own


def one_rank(setup: Setup, method: Method) -> int:
    """The rank that all clients share; BadInput naming the method when they differ."""
    ranks = setup.all_ranks
    if len(ranks) > 1:
        raise BadInput(f"{method.FACTS.title} needs one rank for all clients, but clients.rank gives {', '.join(map(str, ranks))}")
    return ranks[0]
