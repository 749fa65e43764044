"""FedHM (Yao et al. 2021, arXiv 2111.14655): clients train a factorised model, each at the rank of its budget; no frozen base.

    server:    holds the full W of every target module; round 1 begins with the pre-trained one
    client k:  receives the best approximation of W at its rank, U S V' cut to q_k:  B = U S^1/2,  A = S^1/2 V';  W is B A
               trains both:  loss + lambda ||B A||_F^2, a decay of the weight as a whole
    server:    W <- sum_k w_k B_k A_k,   w_k = n_k / sum of n over the participants

Exact as a mean of what clients trained; what the cut leaves out, the squared singular values past q_k, is lost in every round, also
without any training. What crosses the wire: q_k (d_out + d_in) a module, both ways. Not LoRA: q_k is a share of the full rank
min(d_out, d_in), `rank_share` for the clients with the largest budget and in proportion for others, but at least `least_share`:
at the small ranks of an adapter nothing would be left of the model.

Ours: made for training from scratch, the paper also trains the layers that it does not factorise; here they stay as pre-trained
(the head trains as for any method). The strength of the decay. Weight decay of the run, if any, acts on the factors beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fedlora.algebra.lowrank import principal
from fedlora.algebra.products import mean_of_products, whole
from fedlora.errors import BadInput
from fedlora.types import (
    SHARED,
    BaseUpdate,
    Client,
    Diagnostics,
    Factors,
    Facts,
    Local,
    Model,
    ProductDecay,
    Reply,
    Setup,
    Tensors,
    Train,
    value,
)


@dataclass(frozen=True)
class State:
    rounds: int  # how many rounds are behind us
    largest: int  # the largest rank of the run
    W: Tensors
    cut: Factors  # W at the rank of the largest share; each client's factors are its first ranks


@dataclass(frozen=True)
class Up:
    A: Tensors = value("inner", "in")
    B: Tensors = value("out", "inner")


def inner_rank(share: float, d_out: int, d_in: int) -> int:
    """A share of the full rank, to the nearest rank, at least 1."""
    return max(1, round(share * min(d_out, d_in)))


def cut(W: Tensors, share: float) -> Factors:
    """Every matrix at its rank of the share, by the SVD. The ranks are nested: those of a smaller share come first."""
    pairs = {m: principal(x, inner_rank(share, *x.shape)) for m, x in W.items()}
    return Factors({m: A for m, (_, A) in pairs.items()}, {m: B for m, (B, _) in pairs.items()}, 1.0)


@dataclass(frozen=True)
class FedHM:
    """rank_share: of the full rank, for the largest budget. least_share: of the full rank, for any
    budget. decay: lambda, the weight of the decay of B A."""

    rank_share: float = 0.5
    least_share: float = 0.25
    decay: float = 1e-4

    FACTS: ClassVar = Facts(
        title="FedHM",
        paper="2111.14655",
        year=2021,
        exact=True,
        mixed_ranks=True,
        personal=False,
        upload="q_k (d_out + d_in), q_k a share of min(d_out, d_in)",
        download="q_k (d_out + d_in)",
        server="O(d_out d_in (sum q_k + min(d_out, d_in)))",
        asks=frozenset({"drop_base", "penalty"}),
        dims=lambda method, setup, client: {"inner": method._inner_ranks(setup, client)},
    )

    def __post_init__(self) -> None:
        if not 0 < self.least_share <= self.rank_share <= 1:
            raise BadInput("least_share and rank_share must lie in (0, 1], least_share not above rank_share")
        if self.decay < 0:
            raise BadInput("decay must not be negative")

    def _share(self, client: Client, largest: int) -> float:
        return max(self.least_share, self.rank_share * client.rank / largest)

    def _inner_ranks(self, setup: Setup, client: Client) -> range:
        """The inner ranks that a client's modules may have."""
        share = self._share(client, setup.all_ranks[-1])
        ranks = [inner_rank(share, *shape) for shape in setup.shapes.values()]
        return range(min(ranks), max(ranks) + 1)

    def init(self, setup: Setup) -> State:
        W = {m: setup.base(m).clone() for m in setup.shapes}
        return State(0, setup.all_ranks[-1], W, cut(W, self.rank_share))

    def hold(self, setup: Setup, client: Client) -> None:
        return None

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Factors:
        q = {m: inner_rank(self._share(client, state.largest), *W.shape) for m, W in state.W.items()}
        return Factors({m: A[: q[m]] for m, A in state.cut.A.items()}, {m: B[:, : q[m]] for m, B in state.cut.B.items()}, 1.0)

    def local(self, down: Factors, held: None, client: Client, round: int) -> Local:
        roles = frozenset({(SHARED, "A"), (SHARED, "B")})
        done = (yield Train({SHARED: down}, roles, penalty=ProductDecay(SHARED, self.decay), drop_base=True)).slots[SHARED]
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        means = mean_of_products((r.client.num_examples, 1.0, r.up.B, r.up.A) for r in replies)
        W = {m: whole(mean) for m, mean in means.items()}
        return State(round, state.largest, W, cut(W, self.rank_share)), {}

    def deploy(self, state: State) -> Model:
        if not state.rounds:
            return Model()
        return Model(base=BaseUpdate(0, state.rounds, dense=state.W), drop_base=True)
