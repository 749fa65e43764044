"""LoRA-A2 (Koo, Jang, Ok, ACL 2025, arXiv 2410.22815): alternating freeze and adaptive rank selection.

The adapter has a global rank r_G; client k has a budget of r_k ranks for each of the N modules on average. Odd rounds train B, even
rounds train A. In an odd round client k

    probe    trains B for an epoch, giving dB, and goes back
    scores   S[m, i] = ||dB[:, i] A[i, :]||_F = ||dB[:, i]|| ||A[i, :]||      every rank i of every module m
    selects  the r_k N best (m, i) of the whole model: R_k
    trains   B for the local epochs at 5 times the learning rate of A; entries outside R_k do not move
    uploads  the chosen columns of B_k - B, and which they are

and the server adds their mean, B <- B + sum_k w_k dB_k, where a column that a client did not choose counts as zero. Even rounds
do the same with the rows of A and S[m, i] = ||B[:, i]|| ||dA[i, :]||.

Exact in every round: the resting factor is common to all. What crosses the wire: up, r_k N chosen columns (d_out values each) or
rows (d_in), and a bit for each of the r_G N ranks; down, the factor that changed last to a client that took part in the last
round, both factors to others, none in round 1 (the seed gives them).

A client whose probe gave scores that are not finite is Unfit: they say nothing of its ranks, and would sort first.

The paper's text contradicts itself in places (parity, what is uploaded); we follow its Algorithm 1 and the ACL version. Ours: the
mean over the participants, w_k = n_k / sum of n over them, where Algorithm 1 divides by the examples of all K clients, which is the
same only if all take part. Ours where it is silent: r_G = max(16, max r_k); fields say whether the probe is undone and whether it
counts among the local epochs; the adapter's scale is alpha / r_G; the forms of the two alternative criteria, which are those that
fit the uploads of its Table 3: they say how many of the chosen vectors were long ones.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.algebra.alternate import roles_changed, trained_role
from fedlora.algebra.select import top_mask
from fedlora.algebra.tensors import each, minus, plus
from fedlora.errors import BadInput
from fedlora.types import (
    SHARED,
    Client,
    Diagnostics,
    Factors,
    Facts,
    Local,
    Model,
    Reply,
    Setup,
    Tensors,
    Train,
    Trained,
    Unfit,
    change,
    index,
)


class Criterion(Enum):
    """How a rank is scored; shown for a B-round."""

    CONTRIBUTION = "contribution"  # ||dB[:, i]|| ||A[i, :]||: how much the rank moved the product (the paper's)
    MAGNITUDE = "magnitude"  # sum |B[:, i]| after the probe
    SENSITIVITY = "sensitivity"  # mean |dB[:, i] * gradient[:, i]|, the gradient a mean over the probe's steps


@dataclass(frozen=True)
class State:
    epochs: int  # local epochs after the probe
    shared: Factors  # at rank r_G
    seen: Mapping[int, int] = field(default_factory=dict)  # client -> rounds behind the factors it holds; absent is 0


@dataclass(frozen=True)
class Down:
    epochs: int
    new: Factors  # what changed since the client was last here


@dataclass(frozen=True)
class Up:
    A: Tensors = change("chosen", "in")  # even rounds
    B: Tensors = change("out", "chosen")  # odd rounds
    ranks: Tensors = index("chosen", "global")


@dataclass(frozen=True)
class LoRAA2:
    """
    Attributes:
        global_rank: r_G; raised to the largest client rank.
        lr_ratio_b: learning rate of B over that of A (LoRA+, 2402.12354).
        probe_epochs: length of the probe.
        probe_reset: the local epochs start from the round's start; otherwise from the chosen part of the probe.
        probe_counts: the probe is one of the local epochs; otherwise it comes on top.
        criterion: what scores a rank.
    """

    global_rank: int = 16
    lr_ratio_b: float = 5.0
    probe_epochs: int = 1
    probe_reset: bool = True
    probe_counts: bool = False
    criterion: Criterion = Criterion.CONTRIBUTION

    FACTS: ClassVar = Facts(
        title="LoRA-A²",
        paper="2410.22815",
        year=2024,
        exact=True,
        mixed_ranks=True,
        personal=False,
        upload="r_k columns of d_out (odd rounds) or rows of d_in (even) a module on average",
        download="r_G d_out or r_G d_in: the factor that changed last",
        server="O(K r_k d)",
        asks=frozenset({"grad", "mask", "probe"}),
        linear=lambda method, setup, round: True,
        sends=lambda method, state, client, round: frozenset({trained_role(round), "ranks"}),
        dims=lambda method, setup, client: {"global": method._rank(setup), "chosen": range(method._rank(setup) + 1)},
        budget=lambda method, setup, client: {("chosen",): client.rank * len(setup.shapes)},
    )

    def __post_init__(self) -> None:
        if self.global_rank < 1 or self.probe_epochs < 1 or self.lr_ratio_b <= 0:
            raise BadInput("global_rank and probe_epochs must be at least 1, and lr_ratio_b positive")

    def _rank(self, setup: Setup) -> int:
        return max(self.global_rank, *setup.all_ranks)

    def init(self, setup: Setup) -> State:
        epochs = setup.epochs - self.probe_epochs if self.probe_counts else setup.epochs
        if epochs < 1:
            raise BadInput(
                f"method.probe_counts leaves no local epoch: train.epochs = {setup.epochs}, "
                f"method.probe_epochs = {self.probe_epochs}"
            )
        return State(epochs, setup.fresh(self._rank(setup)))

    def hold(self, setup: Setup, client: Client) -> Factors:
        return setup.fresh(self._rank(setup))

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        changed = roles_changed(state.seen.get(client.id, 0) if since is None else 0, round - 1)
        shared = state.shared
        new = replace(shared, A=shared.A if "A" in changed else {}, B=shared.B if "B" in changed else {})
        return Down(state.epochs, new)

    def local(self, down: Down, held: Factors, client: Client, round: int) -> Local:
        start = Factors(down.new.A or held.A, down.new.B or held.B, held.scale)
        role = trained_role(round)
        ask = Train({SHARED: start}, frozenset({(SHARED, role)}), epochs=down.epochs, lr_scale={"B": self.lr_ratio_b})
        wanted = self.criterion is Criterion.SENSITIVITY
        probe = yield replace(ask, epochs=self.probe_epochs, probe=self.probe_reset, want_grad=wanted)
        scores = self._scores(role, start, probe)
        if not all(bool(score.isfinite().all()) for score in scores.values()):
            return Unfit("its probe diverged: not all scores of its ranks are finite"), held
        ranks = top_mask(scores, client.rank * len(scores))
        mask = ranks if role == "B" else each(lambda chosen: chosen[:, None], ranks)
        before, tried = start.role(role), probe.slots[SHARED].role(role)
        if not self.probe_reset:
            ask = replace(ask, slots={SHARED: start.with_role(role, each(torch.where, mask, tried, before))})
        done = (yield replace(ask, mask={(SHARED, role): mask})).slots[SHARED]
        moved = minus(done.role(role), before)
        if role == "B":
            return Up(B=each(lambda d, chosen: d[:, chosen], moved, ranks), ranks=ranks), start
        return Up(A=each(lambda d, chosen: d[chosen], moved, ranks), ranks=ranks), start

    def _scores(self, role: str, start: Factors, probe: Trained) -> dict[str, Tensor]:
        """Module -> the score of each of its ranks, (r_G,)."""
        after = probe.slots[SHARED].role(role)
        rest = start.A if role == "B" else start.B
        along, across = (0, 1) if role == "B" else (1, 0)  # the axis of a rank's own entries in the trained, the resting factor
        if self.criterion is Criterion.MAGNITUDE:
            return each(lambda x: x.abs().sum(along), after)
        change = minus(after, start.role(role))
        if self.criterion is Criterion.SENSITIVITY:
            return each(lambda d, g: (d * g).abs().mean(along), change, probe.grad[SHARED, role])
        return each(lambda d, x: d.norm(dim=along) * x.norm(dim=across), change, rest)

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, Diagnostics]:
        role, shared, seen = trained_role(round), state.shared, dict(state.seen)
        total = {m: torch.zeros_like(x, dtype=torch.float64) for m, x in shared.role(role).items()}
        examples, chosen_by = 0, {}
        for reply in replies:
            for m, chosen in reply.up.ranks.items():
                if role == "B":
                    total[m][:, chosen] += reply.client.num_examples * reply.up.B[m].double()
                else:
                    total[m][chosen] += reply.client.num_examples * reply.up.A[m].double()
            examples += reply.client.num_examples
            seen[reply.client.id] = round - 1
            chosen_by[reply.client.id] = torch.stack([reply.up.ranks[m] for m in total])
        mean = {m: (t / examples).to(shared.A[m].dtype) for m, t in total.items()}
        moved = shared.with_role(role, plus(shared.role(role), mean))
        diagnostics = {
            "ranks_chosen": torch.stack(list(chosen_by.values())),  # (K, N, r_G): what each client chose of each module
            "ranks_chosen_clients": torch.tensor(list(chosen_by)),
        }
        return State(state.epochs, moved, seen), diagnostics

    def deploy(self, state: State) -> Model:
        return Model({SHARED: state.shared})
