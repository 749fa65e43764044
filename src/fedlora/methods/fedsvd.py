"""FedSVD (Lee et al., NeurIPS 2025, arXiv 2505.12805): clients train B alone, and the server turns A to the principal directions.

    client:  trains B with A fixed
    server:  B <- B + sum_k w_k dB_k,   then U S V' = SVD(B A):   B <- U S,   A <- V'   (product unchanged, A A' = I)

Exact: A is common to all in a round, and the SVD of a product of rank r keeps it. The SVD works on the two factors, O(d r^2); it is
done after round t where t > warmup and t is a multiple of `period`, and never with period 0, which is FFA-LoRA. A module whose B is
still zero keeps its A. What crosses the wire: up, the change of B, r d_out a module; down, B, and A where it turned since the
client was last there: r (d_out + d_in); in round 1, and while A never turned, B alone (the seed gives A).

Ours: the SVD by QR of both factors also when A is orthonormal already, where an SVD of B would do: the cost is of the same order,
and rounding does not add up over the rounds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedlora.algebra.lowrank import complete_rows, factored_svd, pad_rank
from fedlora.algebra.tensors import minus, plus, weighted_mean
from fedlora.errors import BadInput
from fedlora.types import SHARED, Client, Diagnostics, Factors, Facts, Local, Model, Reply, Setup, Tensors, Train, change, one_rank


@dataclass(frozen=True)
class State:
    turned: int  # the last of them after which A turned; 0 is the start
    shared: Factors
    seen: Mapping[int, int] = field(default_factory=dict)  # client -> rounds behind the A that it holds; absent is 0


@dataclass(frozen=True)
class Up:
    B: Tensors = change("out", "rank")


@dataclass(frozen=True)
class FedSVD:
    """period: an SVD after each round that is a multiple of it; 0 for none. warmup: the first rounds, after which there is none."""

    period: int = 1
    warmup: int = 0

    FACTS: ClassVar = Facts(
        title="FedSVD",
        paper="2505.12805",
        year=2025,
        exact=True,
        mixed_ranks=False,
        personal=False,
        upload="r d_out",
        download="r d_out, and r d_in when A turned",
        server="O(K r d_out + r^2 d)",
        linear=lambda method, setup, round: True,
    )

    def __post_init__(self) -> None:
        if self.period < 0 or self.warmup < 0:
            raise BadInput("period and warmup must not be negative")

    def init(self, setup: Setup) -> State:
        return State(0, setup.fresh(one_rank(setup, self)))

    def hold(self, setup: Setup, client: Client) -> Tensors:
        return setup.fresh(client.rank).A

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Factors:
        has = state.seen.get(client.id, 0) if since is None else 0
        return state.shared if state.turned > has else replace(state.shared, A={})

    def local(self, down: Factors, held: Tensors, client: Client, round: int) -> Local:
        A = down.A or held
        done = (yield Train({SHARED: replace(down, A=A)}, frozenset({(SHARED, "B")}))).slots[SHARED]
        return Up(B=minus(done.B, down.B)), A

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        seen = dict(state.seen)

        def term(reply: Reply) -> tuple[float, tuple[Tensors]]:
            seen[reply.client.id] = round - 1
            return reply.client.num_examples, (reply.up.B,)

        (dB,) = weighted_mean(map(term, replies))
        A, B, turned = dict(state.shared.A), dict(plus(state.shared.B, dB)), state.turned
        if self.period and round > self.warmup and round % self.period == 0:
            for m in [m for m in B if bool(B[m].any())]:
                rank = len(A[m])
                U, S, Vt = factored_svd(B[m], A[m])
                B[m], A[m] = pad_rank(U * S, Vt, rank)[0], complete_rows(Vt, rank)
                turned = round
        return State(turned, replace(state.shared, A=A, B=B), seen), {}

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})
