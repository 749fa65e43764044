"""What every method claims, one row or more each, written from the papers: `test_laws.py` holds every method to its rows.

A formula counts parameters of one client in one round. `up` is what it uploaded and `last` the round in which it took part before
(0: never).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import ceil
from typing import Any

import ideals
import numpy as np

from fedlora.methods import make
from fedlora.types import BASE, SHARED, Client, Reply, Role, Setup

BOTH = frozenset({"A", "B"})


class Start(Enum):
    """What a client's training starts from in a round."""

    PERSONAL = "personal"  # the slots of the client's own deployed model
    DEPLOYED = "deployed"  # the slots of the deployed model
    COMMON = "common"  # slots that are the same for all clients of one rank
    OWN = "own"  # slots of its own, which change nothing yet
    PART = "part"  # ranks of the deployed model's slots, each client its own choice
    GROUP = "group"  # what is deployed for its group; the common start, or everybody's, where it has no group yet


HALVES = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2), (0, 3))  # every pair of four clients


def takes_part(id: int, round: int) -> bool:
    """Who takes part where a law is tested with changing participants: half of them, others in every round."""
    return id % 4 in HALVES[(round - 1) % len(HALVES)]


def n_k(replies: Sequence[Reply]) -> list[float]:
    return [r.client.num_examples for r in replies]


def uniform(replies: Sequence[Reply]) -> list[float]:
    return [1.0 for _ in replies]


def product_norms(replies: Sequence[Reply]) -> list[float]:
    """HetLoRA: ||B_k A_k||_F over the whole model, from the dense products."""
    products = [[r.up.B[m].double().numpy() @ r.up.A[m].double().numpy() for m in r.up.A] for r in replies]
    return [float(np.sqrt(sum((p**2).sum() for p in product))) for product in products]


@dataclass(frozen=True, eq=False)
class Row:
    """
    Attributes:
        ranks: of the four clients that most laws are tested with.
        roles: round -> the roles that train, which are also those that travel up.
        weights: replies -> what the server's mean is weighted with, up to a factor.
        index_bytes: bytes up that say where values belong.
        truncated: exact only up to the truncation to the largest rank of the run.
        slot: the slot of the roles; BASE for full fine-tuning.
        exact_with: whether exact with these settings, where that is not what FACTS says of the defaults.
        recast: roles that the server changes though no client trains them.
        cuts: the server keeps only a part even of one client's update.
        idle: zero local steps leave the deployed function unchanged.
        switch: the round after which other slots are deployed than before; 0: none.
        starts: what training starts from.
        tasks: of the clients in turn, where the run has several.
        grouped: the server groups clients by what they upload, and keeps a model a group.
        trains: round -> all that any client trains in it, where that is not the roles of the slot.
        own: slots that a client keeps to itself.
        remembers: the server's mean is over the last uploads of all clients that it ever heard.
        by_role: the server is judged by the roles that travel, not by a function: they mean nothing without a client's part.
        keeps: a client that sits out keeps its whole model.
        ideal: where the method is not exact, its paper's averaging rule (`ideals.py`).
        at: the round in which laws of one aggregation are tested.
        lr: the learning rate for laws that look at how much was learned.
    """

    method: str
    exact: bool
    mixed_ranks: bool
    personal: bool
    ranks: tuple[int, ...]
    upload: Callable[[Setup, Client, int, Any], int]
    download: Callable[[Setup, Client, int, int], int]
    roles: Callable[[int], frozenset[str]] = lambda round: BOTH
    weights: Callable[[Sequence[Reply]], list[float]] = n_k
    index_bytes: Callable[[Setup], int] = lambda setup: 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False
    slot: str = SHARED
    exact_with: bool | None = None
    recast: frozenset[str] = frozenset()
    cuts: bool = False
    idle: bool = True
    switch: int = 0
    starts: Start = Start.DEPLOYED
    tasks: tuple[tuple[str, ...], ...] = ()
    grouped: bool = False
    trains: Callable[[int], frozenset[Role]] | None = None
    own: frozenset[str] = frozenset()
    remembers: bool = False
    by_role: bool = False
    keeps: bool = False
    ideal: ideals.Rule | None = None
    at: int = 3
    lr: float = 0.02

    @property
    def exact_here(self) -> bool:
        return self.exact if self.exact_with is None else self.exact_with

    def make(self) -> Any:
        return make(self.method, self.settings)

    def trained(self, round: int) -> frozenset[Role]:
        return self.trains(round) if self.trains else frozenset((self.slot, role) for role in self.roles(round))

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.settings.items())])


def all_parameters(setup: Setup) -> int:
    return sum(int(np.prod(shape)) for shape in setup.params.values())


def P(setup: Setup, rank: int, role: str) -> int:
    """The parameters of one factor at a rank."""
    return sum(rank * (d_out if role == "B" else d_in) for d_out, d_in in setup.shapes.values())


def both(setup: Setup, client: Client, *_: Any) -> int:
    return P(setup, client.rank, "A") + P(setup, client.rank, "B")


def odd_B_even_A(round: int) -> frozenset[str]:
    return frozenset("B" if round % 2 == 1 else "A")


def moved_since(setup: Setup, rank: int, round: int, last: int) -> int:
    """The factors that any round from `last` on has changed: a client keeps those that it started its last round with."""
    roles = {role for t in range(max(last, 1), round) for role in odd_B_even_A(t)}
    return sum(P(setup, rank, role) for role in roles)


def chosen_ranks(setup: Setup, client: Client, round: int, up: Any) -> int:
    """LoRA-A2: the chosen columns of B or rows of A."""
    axis = 0 if round % 2 == 1 else 1
    return sum(int(up.ranks[m].sum()) * setup.shapes[m][axis] for m in setup.shapes)


def lora_a2(ranks: tuple[int, ...], **settings: Any) -> Row:
    return Row(
        "lora-a2",
        exact=True,
        mixed_ranks=True,
        personal=False,
        ranks=ranks,
        upload=chosen_ranks,
        download=lambda setup, client, round, last: moved_since(setup, 4, round, last),
        roles=odd_B_even_A,
        index_bytes=lambda setup: len(setup.shapes) * ceil(4 / 8),
        settings={"global_rank": 4, **settings},
    )


def rolora(**settings: Any) -> Row:
    return Row(
        "rolora",
        exact=True,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, round, up: sum(P(setup, client.rank, role) for role in odd_B_even_A(round)),
        download=lambda setup, client, round, last: moved_since(setup, client.rank, round, last),
        roles=odd_B_even_A,
        weights=uniform if settings.get("uniform_weights", True) else n_k,
        settings=settings,
    )


# Methods that merge into the base. A client gets the pairs that it misses, or all that was ever merged as dense matrices, whichever
# is fewer numbers.


def base_updates(setup: Setup, last: int, pairs: Sequence[int]) -> int:
    """The parameters that bring a base from where round `last` had it to after `len(pairs)` rounds; pairs[t - 1] is the size of
    round t's pair. After `last` rounds' start the client had what rounds before `last` gave: `last - 1` pairs."""
    whole = sum(d_out * d_in for d_out, d_in in setup.shapes.values())
    return min(sum(pairs[max(last - 1, 0) :]), whole)


def participants(setup: Setup, round: int) -> list[Client]:
    return [c for c in setup.clients if takes_part(c.id, round)]


def wide_pair(setup: Setup, width: int) -> int:
    """A pair of this width in every module, or of the module's smaller side."""
    return sum(min(width, d_out, d_in) * (d_out + d_in) for d_out, d_in in setup.shapes.values())


def flora(ranks: tuple[int, ...]) -> Row:
    def stacks(setup: Setup, client: Client, round: int, last: int) -> int:
        return base_updates(setup, last, [wide_pair(setup, sum(c.rank for c in participants(setup, t))) for t in range(1, round)])

    return Row("flora", exact=True, mixed_ranks=True, personal=False, ranks=ranks, upload=both, download=stacks, starts=Start.OWN)


def fedex(rank: int, **settings: Any) -> Row:
    def and_residuals(setup: Setup, client: Client, round: int, last: int) -> int:
        widths = [(len(participants(setup, t)) - 1) * rank for t in range(1, round)]
        cut = settings.get("residual_rank", 100)
        return both(setup, client) + base_updates(setup, last, [wide_pair(setup, min(w, cut)) for w in widths])

    return Row(
        "fedex-lora",
        exact=True,
        mixed_ranks=False,
        personal=False,
        ranks=(rank,) * 4,
        upload=both,
        download=and_residuals,
        weights=uniform if settings.get("uniform_weights", True) else n_k,
        settings=settings,
        exact_with="residual_rank" not in settings,
        ideal=ideals.with_cut_residual(uniform, settings["residual_rank"]) if "residual_rank" in settings else None,
    )


def lora_fair(**settings: Any) -> Row:
    return Row(
        "lora-fair",
        exact=False,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=both,
        download=both,
        settings=settings,
        ideal=(ideals.with_ridge if settings else ideals.with_cosine)(n_k, 0.01),
    )


def frlora(rank: int, **settings: Any) -> Row:
    return Row(
        "frlora",
        exact=False,
        mixed_ranks=False,
        personal=False,
        ranks=(rank,) * 4,
        upload=both,
        download=lambda setup, client, round, last: base_updates(setup, last, [both(setup, client)] * (round - 1)),
        weights=uniform if settings.get("uniform_weights", True) else n_k,
        settings=settings,
        ideal=ideals.apart(uniform if settings.get("uniform_weights", True) else n_k),
    )


def fedsvd(period: int, warmup: int = 0) -> Row:
    def turned_since(setup: Setup, client: Client, round: int, last: int) -> int:
        turns = [t for t in range(max(last, 1), round) if period and t > warmup and t % period == 0]
        return P(setup, client.rank, "B") + (P(setup, client.rank, "A") if turns else 0)

    return Row(
        "fedsvd",
        exact=True,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, round, up: P(setup, client.rank, "B"),
        download=turned_since,
        roles=lambda round: frozenset("B"),
        settings={"period": period, "warmup": warmup},
        recast=frozenset("A") if period else frozenset(),
    )


def florist(tau: float, ranks: tuple[int, ...], **settings: Any) -> Row:
    def cut(setup: Setup, client: Client, round: int, last: int) -> int:
        """tau = 1 keeps every rank of the stack, a tau near 0 keeps one."""
        stack = sum(c.rank for c in participants(setup, round - 1)) if tau == 1.0 else 1
        return 0 if round == 1 else wide_pair(setup, min(client.rank, stack))

    return Row(
        "florist",
        exact=False,
        mixed_ranks=True,
        personal=False,
        ranks=ranks,
        upload=both,
        download=cut,
        settings={"tau": tau, **settings},
        exact_with=tau == 1.0,
        starts=Start.COMMON,
        cuts=bool(tau < 1.0 and settings.get("fresh_rows")),  # of padded ranks nothing comes back that could be cut
        ideal=ideals.best_at_rank(n_k, 1) if tau < 1.0 else None,  # such a tau keeps one
        idle=tau < 1.0,  # the global adapter has more ranks than a client
    )


# Methods that group clients by what they upload.

TWO_TASKS = (("x",), ("y",), ("x",), ("y",))  # in data where clients of one task differ little


def fl_tac(tasks: tuple[tuple[str, ...], ...], **settings: Any) -> Row:
    def each(setup: Setup, client: Client, *_: Any) -> int:
        return max(1, len(client.domains)) * both(setup, client)

    def copies(setup: Setup, client: Client, round: int, last: int) -> int:
        """Before it was there, a client of several tasks gets one mean for all of them, and what is the same travels once."""
        return each(setup, client) if last else both(setup, client)

    return Row(
        "fl-tac",
        exact=False,
        mixed_ranks=False,
        personal=True,
        ranks=(2, 2, 2, 2),
        upload=each,
        download=copies,
        weights=uniform if settings.get("uniform_weights") else n_k,
        settings=settings,
        starts=Start.GROUP,
        tasks=tasks,
        grouped=True,
        ideal=ideals.by_task(settings.get("uniform_weights", False)),
        keeps=True,
    )


def fedlease(experts: int, **settings: Any) -> Row:
    def routers(setup: Setup) -> int:
        return (2 * experts - 1) * sum(d_in for _, d_in in setup.shapes.values()) if experts > 1 else 0

    return Row(
        "fedlease",
        exact=False,
        mixed_ranks=False,
        personal=True,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, round, up: both(setup, client) + (routers(setup) if round > 2 else 0),
        download=lambda setup, client, round, last: experts * both(setup, client) + routers(setup) if last else 0,
        roles=lambda round: BOTH | {"G"} if round > 2 else BOTH,
        weights=uniform if settings.get("uniform_weights", True) else n_k,
        settings=settings,
        starts=Start.GROUP,
        tasks=TWO_TASKS,
        grouped=True,
        ideal=ideals.experts_by_task(settings.get("uniform_weights", True)),
    )


def fslora(ranks: tuple[int, ...], **settings: Any) -> Row:
    return Row(
        "fslora",
        exact=False,
        mixed_ranks=True,
        personal=False,
        ranks=ranks,
        upload=both,
        download=both,
        weights=uniform if settings.get("uniform_weights", True) else n_k,
        index_bytes=lambda setup: ceil(4 / 8),  # one set for all modules
        settings={"global_rank": 4, **settings},
        cuts=min(ranks) < 4,  # the server's model has no sketch
        ideal=ideals.sketched(uniform if settings.get("uniform_weights", True) else n_k),
        starts=Start.PART,
    )


def flasc(down: float, up: float, **settings: Any) -> Row:
    averages = settings.get("server") == "sgd"

    def mask_bits(setup: Setup) -> int:
        return sum(ceil(2 * side / 8) for shape in setup.shapes.values() for side in shape)

    def kept(setup: Setup, client: Client, *_: Any) -> int:
        return int(up * both(setup, client))

    def sent(setup: Setup, client: Client, round: int, last: int) -> int:
        """B is zero before the first round, and zeros do not travel."""
        return min(int(down * both(setup, client)), P(setup, client.rank, "A") if round == 1 else both(setup, client))

    return Row(
        "flasc",
        exact=False,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=kept,
        download=sent,
        weights=uniform,
        index_bytes=mask_bits,
        settings={"density_down": down, "density_up": up, **settings},
        cuts=not averages or min(down, up) < 1.0,
        idle=averages,  # Adam's momentum goes on
        ideal=ideals.sparse(uniform, up, None if averages else settings["server_lr"]),
        starts=Start.DEPLOYED if down == 1.0 else Start.COMMON,
    )


def slora(share: float, sparse_rounds: int, **settings: Any) -> Row:
    density = 0.1

    def entries(setup: Setup) -> int:
        return sum(max(1, round(density * d_out * d_in)) for d_out, d_in in setup.shapes.values())

    return Row(
        "slora",
        exact=False,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, t, up: entries(setup) if t <= sparse_rounds else both(setup, client),
        download=lambda setup, client, t, last: both(setup, client) if t > sparse_rounds else entries(setup) if t > 1 else 0,
        roles=lambda t: frozenset("W") if t <= sparse_rounds else BOTH,
        settings={"density": density, "sparse_share": share, **settings},
        ideal=ideals.sparse_then_low_rank(n_k, sparse_rounds, 2),
        cuts=sparse_rounds == 3,  # the third round ends in the switch, which cuts the change to the rank
        starts=Start.COMMON,
        switch=sparse_rounds,
        trains=lambda t: frozenset({(BASE, "W")} if t <= sparse_rounds else {(SHARED, "A"), (SHARED, "B")}),
    )


# Sketches, sparse messages and a sparse start.
SPARSE = [
    fslora((1, 2, 4, 2)),
    fslora((4, 4, 4, 4)),
    fslora((1, 2, 4, 2), uniform_weights=False),
    flasc(0.5, 0.25, server="sgd"),
    flasc(1.0, 1.0, server="sgd"),
    flasc(0.5, 0.25, server="adam", server_lr=0.02),
    slora(0.1, 1),
    slora(0.75, 3),
]


# The FedLoRU family, FedHM and methods with small trained cores.


def merges(setup: Setup, last: int, round: int, period: int, size: int) -> int:
    """The merges that a client missed, one of this size after every `period`-th round."""
    return base_updates(setup, last, [size if t % period == 0 else 0 for t in range(1, round)])


def fedloru(cycle: int, **settings: Any) -> Row:
    literal = settings.get("accumulate") == "literal"

    def and_merges(setup: Setup, client: Client, round: int, last: int) -> int:
        """Right after a merge that is not a reset, the adapter is the merged pair, and one message holds both once."""
        live, missed = both(setup, client), merges(setup, last, round, cycle, both(setup, client))
        as_pairs = missed % sum(d_out * d_in for d_out, d_in in setup.shapes.values()) > 0
        return missed + (0 if literal and as_pairs and (round - 1) % cycle == 0 else live)

    return Row(
        "fedloru",
        exact=False,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=both,
        download=and_merges,
        settings={"period": cycle, **settings},
        ideal=ideals.apart(n_k),
        starts=Start.COMMON if literal else Start.DEPLOYED,
        idle=not literal,
    )


def pfedloru(cycle: int) -> Row:
    return Row(
        "pfedloru",
        exact=False,
        mixed_ranks=False,
        personal=True,
        ranks=(2, 2, 2, 2),
        upload=both,
        download=lambda setup, client, round, last: both(setup, client) + merges(setup, last, round, cycle, both(setup, client)),
        settings={"period": cycle},
        trains=lambda round: frozenset((slot, role) for slot in (SHARED, "personal") for role in "AB"),
        own=frozenset({"personal"}),
        ideal=ideals.apart(n_k),
    )


def mfedloru(ranks: tuple[int, ...], cycle: int) -> Row:
    def and_merges(setup: Setup, client: Client, round: int, last: int) -> int:
        return both(setup, client) + merges(setup, last, round, cycle, wide_pair(setup, max(setup.ranks.values())))

    return Row(
        "mfedloru",
        exact=False,
        mixed_ranks=True,
        personal=False,
        ranks=ranks,
        upload=both,
        download=and_merges,
        settings={"period": cycle},
        ideal=ideals.nested(n_k),
        cuts=min(ranks) < max(ranks),  # what a small client cannot hold stays in the server's model
    )


def fedhm(ranks: tuple[int, ...], rank_share: float, least_share: float = 0.25) -> Row:
    def factorised(setup: Setup, client: Client, *_: Any) -> int:
        share = max(least_share, rank_share * client.rank / max(c.rank for c in setup.clients))
        return sum(int(share * min(o, i) + 0.5) * (o + i) for o, i in setup.shapes.values())

    return Row(
        "fedhm",
        exact=True,
        mixed_ranks=True,
        personal=False,
        ranks=ranks,
        upload=factorised,
        download=factorised,
        settings={"rank_share": rank_share, "least_share": least_share},
        starts=Start.COMMON,
        idle=rank_share == 1.0,  # the model that clients get is cut in every round
    )


def fed_sb(**settings: Any) -> Row:
    def core(setup: Setup, rank: int) -> int:
        return len(setup.shapes) * rank**2

    def and_once_the_rest(setup: Setup, client: Client, round: int, last: int) -> int:
        if round == 1:
            return 0
        return core(setup, client.rank) + (0 if last > 1 else both(setup, client))

    return Row(
        "fed-sb",
        exact=True,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, round, up: both(setup, client) if round == 1 else core(setup, client.rank),
        download=and_once_the_rest,
        roles=lambda round: BOTH if round == 1 else frozenset("C"),
        settings=settings,
        truncated=True,  # in round 1
        recast=frozenset("C"),  # in round 1, from nothing
    )


def ravan(ranks: tuple[int, ...], heads: int) -> Row:
    def cores(setup: Setup, count: int) -> int:
        return count * len(setup.shapes) * max(setup.ranks.values()) ** 2

    return Row(
        "ravan",
        exact=True,
        mixed_ranks=True,
        personal=False,
        ranks=ranks,
        upload=lambda setup, client, *_: cores(setup, max(1, int(heads * client.rank / max(setup.ranks.values())))),
        download=lambda setup, *_: cores(setup, heads),
        roles=lambda round: frozenset("C"),
        index_bytes=lambda setup: ceil(heads / 8),  # one set for all modules
        settings={"heads": heads},
        trains=lambda round: frozenset((f"head{i}", role) for i in range(heads) for role in "CD"),
    )


def ce_lora(parts: int = 3, **settings: Any) -> Row:
    def with_mixtures(setup: Setup, client: Client, round: int, up: Any) -> int:
        """r^2 a module; once, two classes of features as long as q's input: c k (2 d + 1) + c."""
        features = setup.shapes["q"][1]
        return client.rank**2 * len(setup.shapes) + (2 * parts * (2 * features + 1) + 2 if up.mixtures else 0)

    return Row(
        "ce-lora",
        exact=False,
        mixed_ranks=False,
        personal=True,
        ranks=(2, 2, 2, 2),
        upload=with_mixtures,
        download=lambda setup, client, round, last: client.rank**2 * len(setup.shapes),
        roles=lambda round: frozenset("C"),
        trains=lambda round: frozenset((SHARED, role) for role in "ABC"),
        weights=uniform,
        settings={"components": parts, **settings},
        idle=False,  # every round mixes anew
        starts=Start.PERSONAL,
        grouped=True,  # each client its own
        ideal=ideals.over_all_known("C"),
        keeps=True,
        remembers=True,
        by_role=True,
        lr=0.01,  # three factors in a row, and a client of one example
        at=1,  # where all were sent the same
    )


def fedsa_lora(**settings: Any) -> Row:
    vera = settings.get("variant") == "vera"

    def shared(setup: Setup, client: Client, *_: Any) -> int:
        return client.rank * len(setup.shapes) if vera else P(setup, client.rank, "A")

    return Row(
        "fedsa-lora",
        exact=False,
        mixed_ranks=False,
        personal=True,
        ranks=(2, 2, 2, 2),
        upload=shared,
        download=shared,
        roles=lambda round: frozenset("C" if vera else "A"),
        trains=lambda round: frozenset((SHARED, role) for role in ("CD" if vera else "AB")),
        settings=settings,
        starts=Start.PERSONAL,
        by_role=True,
        lr=0.2 if vera else 0.02,  # two vectors between small random factors
    )


def feddpa(learning: int = 99, **settings: Any) -> Row:
    """`learning`: the last round that teaches the global adapter."""
    after = settings.get("variant") == "f"

    def trains(round: int) -> frozenset[Role]:
        slots = ([SHARED] if round <= learning else []) + (["local"] if round > (learning if after else 1) else [])
        return frozenset((slot, role) for slot in slots for role in "AB")

    return Row(
        "feddpa",
        exact=False,
        mixed_ranks=False,
        personal=True,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, round, up: both(setup, client) if round <= learning else 0,
        download=both,
        roles=lambda round: BOTH if round <= learning else frozenset(),
        trains=trains,
        weights=uniform if settings.get("uniform_weights", True) else n_k,
        settings=settings,
        own=frozenset({"local"}),
        by_role=True,
    )


ROWS = [
    *SPARSE,
    Row(
        "fedavg",
        exact=True,
        mixed_ranks=True,
        personal=False,
        ranks=(1, 2, 4, 2),
        upload=lambda setup, client, round, up: all_parameters(setup),
        download=lambda setup, client, round, last: all_parameters(setup) if round > 1 else 0,
        roles=lambda round: frozenset("W"),
        slot=BASE,
        starts=Start.COMMON,
    ),
    Row(
        "fedit",
        exact=False,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=both,
        download=both,
        ideal=ideals.apart(n_k),
    ),
    Row(
        "ffa-lora",
        exact=True,
        mixed_ranks=False,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=lambda setup, client, round, up: P(setup, client.rank, "B"),
        download=lambda setup, client, round, last: P(setup, client.rank, "B"),
        roles=lambda round: frozenset("B"),
    ),
    Row(
        "flexlora",
        exact=True,
        mixed_ranks=True,
        personal=False,
        ranks=(1, 2, 4, 2),
        upload=both,
        download=both,
        truncated=True,
        starts=Start.COMMON,  # at the client's own scale; the deployed one has scale 1
    ),
    Row(
        "raflora",
        exact=False,  # upper slices count in full
        mixed_ranks=True,
        personal=False,
        ranks=(1, 2, 4, 2),
        upload=both,
        download=both,
        cuts=True,  # of a small client alone: the slices that it lacks stay
        ideal=ideals.by_slice(n_k, (1, 2, 4, 2)),
        starts=Start.COMMON,  # at the clients' scale; the deployed one has scale 1
    ),
    Row(
        "raflora",
        exact=False,
        mixed_ranks=True,
        personal=False,
        ranks=(2, 2, 2, 2),
        upload=both,
        download=both,
        settings={"scale": "own-scale"},
        truncated=True,
        exact_with=True,
        starts=Start.COMMON,
    ),
    # gamma = 1 never prunes, so that formulas in r_k hold; test_hetlora.py has the pruning.
    Row(
        "hetlora",
        exact=False,
        mixed_ranks=True,
        personal=False,
        ranks=(1, 2, 4, 2),
        upload=both,
        download=both,
        weights=product_norms,
        settings={"gamma": 1.0},
        ideal=ideals.apart(product_norms),
    ),
    Row(
        "rbla",
        exact=False,
        mixed_ranks=True,
        personal=False,
        ranks=(1, 2, 4, 2),
        upload=both,
        download=both,
        ideal=ideals.by_owner(n_k, 4),
        starts=Start.PART,
        cuts=True,  # of a small client: the ranks that it lacks stay
    ),
    Row(
        "rbla",
        exact=False,
        mixed_ranks=True,
        personal=False,
        ranks=(4, 4, 4, 4),
        upload=both,
        download=both,
        ideal=ideals.by_owner(n_k, 4),
    ),
    rolora(),
    rolora(uniform_weights=False),
    lora_a2((1, 2, 4, 2)),
    lora_a2((4, 4, 4, 4)),
    lora_a2((1, 2, 4, 2), probe_reset=False),
    lora_a2((1, 2, 4, 2), probe_counts=True, criterion="sensitivity"),
    lora_a2((1, 2, 4, 2), criterion="magnitude"),
    flora((1, 2, 4, 2)),
    flora((1, 1, 1, 1)),
    fedex(1),
    fedex(2),
    fedex(2, uniform_weights=False),
    fedex(2, residual_rank=1),
    lora_fair(),
    lora_fair(objective="ridge"),
    frlora(1),
    frlora(2, uniform_weights=False),
    fedsvd(1),
    fedsvd(0),
    fedsvd(2, warmup=1),
    florist(1.0, (1, 2, 4, 2)),
    florist(1e-6, (1, 2, 4, 2)),
    florist(1e-6, (1, 2, 4, 2), fresh_rows=True),
    fl_tac(TWO_TASKS),
    fl_tac((("x",), ("x", "y"), ("y",), ("x", "y")), uniform_weights=True),
    fedlease(2),
    fedlease(2, uniform_weights=False, renormalise=False),
    fedloru(2),
    fedloru(1),
    fedloru(2, accumulate="literal"),
    pfedloru(2),
    mfedloru((1, 2, 4, 2), 2),
    mfedloru((2, 2, 2, 2), 3),
    fedhm((1, 2, 4, 2), 0.5),
    fedhm((1, 2, 4, 2), 0.75, least_share=0.5),
    fedhm((2, 2, 2, 2), 1.0),
    fed_sb(),
    fed_sb(first_steps=3),
    ravan((2, 2, 2, 2), 3),
    ravan((1, 2, 4, 2), 4),
    ce_lora(),
    ce_lora(2, combination="product"),
    ce_lora(1, combination="data"),
    fedsa_lora(),
    fedsa_lora(variant="vera"),
    feddpa(),
    feddpa(uniform_weights=False),
    feddpa(3, variant="f", federated=0.75),
]
