"""What the papers' servers make of a round, dense, in numpy and float64: averaging rules of methods that are not exact (law 11).

A rule sees all rounds so far, the last one being the one to judge, and gives the change of every parameter from its pre-trained
value that the deployed model must have.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from fedlora.types import BASE, SHARED, Client, Factors, Model, Reply, Setup, Train, Trained

Dense = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """One client's part in a round: the slots that it trained from and what came of them, its base as a change of W, its reply."""

    start: Mapping[str, Factors]
    done: Mapping[str, Factors]
    full: Mapping[str, Any]
    asked: Sequence[tuple[Train, Trained]]  # all that it trained, probes left out
    base: Mapping[str, Any]
    reply: Reply


@dataclass(frozen=True)
class Round:
    setup: Setup
    number: int
    before: Model  # as it was deployed
    parts: Sequence[Part]


Rule = Callable[[Sequence[Round]], Dense]
Weights = Callable[[Sequence[Reply]], list[float]]


def _np(x: Any) -> np.ndarray:
    return x.detach().double().numpy()


def shares(weights: Weights, parts: Sequence[Part]) -> np.ndarray:
    w = np.array(weights([p.reply for p in parts]), dtype=np.float64)
    return w / w.sum()


def zero_padded(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape)
    out[tuple(map(slice, x.shape))] = x
    return out


def changed(now: Round, weight: Callable[[str], np.ndarray], base: Mapping[str, Any] | None = None) -> Dense:
    """A model whose weights moved so far beside a base; biases stay."""
    base = now.parts[0].base if base is None else base
    change = {name: np.zeros(shape) for name, shape in now.setup.params.items()}
    return change | {f"{m}.weight": weight(m) + _np(base[m]) for m in now.setup.shapes}


def means(now: Round, weights: Weights, m: str, slot: str = SHARED) -> tuple[np.ndarray, np.ndarray, float]:
    """B and A averaged apart, factors of fewer ranks with zeros past their end, and the scale."""
    w = shares(weights, now.parts)
    own = [p.done[slot] for p in now.parts]
    rank = max([len(f.A[m]) for f in own] + [len(f.A[m]) for name, f in now.before.slots.items() if name == slot])
    d_out, d_in = now.setup.shapes[m]
    B = sum(x * zero_padded(_np(f.B[m]), (d_out, rank)) for x, f in zip(w, own, strict=True))
    A = sum(x * zero_padded(_np(f.A[m]), (rank, d_in)) for x, f in zip(w, own, strict=True))
    return B, A, own[0].scale


def apart(weights: Weights, slot: str = SHARED) -> Rule:
    """FedIT and all that average A and B as it does: W + s mean(B) mean(A) beside the base that everybody trained on."""

    def rule(rounds: Sequence[Round]) -> Dense:
        def weight(m: str) -> np.ndarray:
            B, A, s = means(rounds[-1], weights, m, slot)
            return s * B @ A

        return changed(rounds[-1], weight)

    return rule


def by_owner(weights: Weights, rank: int) -> Rule:
    """RBLA: each rank's row of A and column of B is the mean over those who have it; where nobody has, it stays."""

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]
        w = weights([p.reply for p in now.parts])

        def weight(m: str) -> np.ndarray:
            before = now.before.slots[SHARED]
            total = np.zeros((before.B[m].shape[0], before.A[m].shape[1]))
            for j in range(rank):
                has = [(x, p.done[SHARED]) for x, p in zip(w, now.parts, strict=True) if len(p.done[SHARED].A[m]) > j]
                n = sum(x for x, _ in has)
                a = sum(x / n * _np(f.A[m][j]) for x, f in has) if has else _np(before.A[m][j])
                b = sum(x / n * _np(f.B[m][:, j]) for x, f in has) if has else _np(before.B[m][:, j])
                total += before.scale * np.outer(b, a)
            return total

        return changed(now, weight)

    return rule


def mean_of_products(now: Round, weights: Weights, m: str) -> np.ndarray:
    w = shares(weights, now.parts)
    return sum(
        x * p.done[SHARED].scale * _np(p.done[SHARED].B[m]) @ _np(p.done[SHARED].A[m]) for x, p in zip(w, now.parts, strict=True)
    )


def cut(M: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def best_at_rank(weights: Weights, rank: int) -> Rule:
    """The best approximation of the mean of the products at a rank."""

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]
        return changed(now, lambda m: cut(mean_of_products(now, weights, m), rank))

    return rule


def with_cut_residual(weights: Weights, rank: int) -> Rule:
    """FedEx-LoRA: what averaging apart leaves out joins the base, cut to a rank."""

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]

        def weight(m: str) -> np.ndarray:
            B, A, s = means(now, weights, m)
            return s * B @ A + cut(mean_of_products(now, weights, m) - s * B @ A, rank)

        return changed(now, weight)

    return rule


def with_ridge(weights: Weights, penalty: float) -> Rule:
    """B corrected by the X of min ||M - (B + X) A||^2 + penalty ||X||^2: least squares with the penalty as further rows."""

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]

        def weight(m: str) -> np.ndarray:
            B, A, s = means(now, weights, m)
            left = np.vstack([A.T, np.sqrt(penalty) * np.eye(len(A))])
            right = np.vstack([(mean_of_products(now, weights, m) / s - B @ A).T, np.zeros((len(A), len(B)))])
            return s * (B + np.linalg.lstsq(left, right, rcond=None)[0].T) @ A

        return changed(now, weight)

    return rule


def with_cosine(weights: Weights, penalty: float) -> Rule:
    """LoRA-FAIR: B corrected by the X of min 1 - cos(M, (B + X) A) + penalty ||X||, a step of the norm and not of its square.

    Zero where the gradient of the cosine at X = 0 is no longer than the penalty. Else, with N = M A', G = A A', Y = B + X, all is
    stationary where X = (c N - B G)(G + v I)^-1 for two numbers c = |YA|^2 / <N, Y> and v = penalty |M| |YA|^3 / (|X| <N, Y>): for
    a given v the first is quadratic in c, and v is a root on a line. Of several the one of the smallest objective.
    """

    def best(B: np.ndarray, A: np.ndarray, M: np.ndarray) -> np.ndarray:
        N, G, size = M @ A.T, A @ A.T, np.linalg.norm(M)
        P = B @ A
        if size == 0 or not P.any():
            return 0 * B
        slope = (M - (M * P).sum() / (P**2).sum() * P) @ A.T / size / np.linalg.norm(P)
        if np.linalg.norm(slope) <= penalty:
            return 0 * B

        def correction(v: float) -> np.ndarray:
            inverse = np.linalg.inv(G + v * np.eye(len(G)))
            Y0, Y1 = v * B @ inverse, N @ inverse
            quadratic = [
                (N * Y1).sum() - (Y1 @ G * Y1).sum(),
                (N * Y0).sum() - 2 * (Y0 @ G * Y1).sum(),
                -(Y0 @ G * Y0).sum(),
            ]
            c = max(np.roots(quadratic).real)
            return Y0 + c * Y1 - B

        def off(log_v: float) -> float:
            X = correction(np.exp(log_v))
            Y = B + X
            return log_v + np.log(np.linalg.norm(X) * (N * Y).sum() / (penalty * size * np.linalg.norm(Y @ A) ** 3))

        def objective(X: np.ndarray) -> float:
            Y = (B + X) @ A
            return 1 - (M * Y).sum() / size / np.linalg.norm(Y) + penalty * np.linalg.norm(X)

        grid = np.linspace(-25, 25, 201) + np.log(np.linalg.norm(G))
        values = [off(x) for x in grid]
        ends = [(a, b) for a, b, x, y in zip(grid, grid[1:], values, values[1:], strict=False) if x * y < 0]
        return min((correction(np.exp(brentq(off, *end, xtol=1e-14))) for end in ends), key=objective)

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]

        def weight(m: str) -> np.ndarray:
            B, A, s = means(now, weights, m)
            return s * (B + best(B, A, mean_of_products(now, weights, m) / s)) @ A

        return changed(now, weight)

    return rule


def moved(weights: Weights, change: Callable[[Part, Factors, str], tuple[np.ndarray, np.ndarray]]) -> Rule:
    """The shared B and A, each moved by the mean of its own change: part, shared factors, module -> dB (d_out, r), dA (r, d_in)."""

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]
        w, old = shares(weights, now.parts), now.before.slots[SHARED]

        def weight(m: str) -> np.ndarray:
            changes = [change(p, old, m) for p in now.parts]
            B = _np(old.B[m]) + sum(x * dB for x, (dB, _) in zip(w, changes, strict=True))
            A = _np(old.A[m]) + sum(x * dA for x, (_, dA) in zip(w, changes, strict=True))
            return old.scale * B @ A

        return changed(now, weight)

    return rule


def sketched(weights: Weights) -> Rule:
    """FSLoRA: the chosen ranks' changes, averaged over all participants, on the factors of everybody."""

    def change(p: Part, old: Factors, m: str) -> tuple[np.ndarray, np.ndarray]:
        dB, dA = np.zeros(tuple(old.B[m].shape)), np.zeros(tuple(old.A[m].shape))
        for i, rank in enumerate(np.flatnonzero(p.reply.up.ranks[m].numpy())):
            dB[:, rank] = _np(p.done[SHARED].B[m])[:, i] - _np(old.B[m])[:, rank]
            dA[rank] = _np(p.done[SHARED].A[m])[i] - _np(old.A[m])[rank]
        return dB, dA

    return moved(weights, change)


def _entries(f: Factors, modules: Sequence[str]) -> np.ndarray:
    return np.concatenate([*(_np(f.A[m]).ravel() for m in modules), *(_np(f.B[m]).ravel() for m in modules)])


def sparse(weights: Weights, density_up: float, adam: float | None = None) -> Rule:
    """FLASC: each change cut to its largest entries, then the server's step: the mean itself, or Adam at a rate."""

    def mean(now: Round, modules: Sequence[str]) -> np.ndarray:
        total = 0.0
        for x, p in zip(shares(weights, now.parts), now.parts, strict=True):
            moved = _entries(p.done[SHARED], modules) - _entries(p.start[SHARED], modules)
            kept = np.argsort(-np.abs(moved), kind="stable")[: max(1, int(density_up * len(moved)))]
            sent = np.zeros_like(moved)
            sent[kept] = moved[kept]
            total = total + x * sent
        return total

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]
        modules, old = list(now.setup.shapes), now.before.slots[SHARED]
        step = mean(now, modules)
        if adam is not None:
            first = second = np.zeros_like(step)
            for t, each in enumerate(rounds, 1):
                g = mean(each, modules)
                first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
                step = adam * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        moved = _entries(old, modules) + step
        parts, at = {}, 0
        for role in ("A", "B"):
            for m in modules:
                shape = tuple(old.role(role)[m].shape)
                parts[role, m] = moved[at : at + np.prod(shape)].reshape(shape)
                at += int(np.prod(shape))
        return changed(now, lambda m: old.scale * parts["B", m] @ parts["A", m])

    return rule


def sparse_then_low_rank(weights: Weights, stage: int, rank: int) -> Rule:
    """SLoRA: the mean of sparse changes of W, cut to the rank after the last round of its first stage; then as FedIT."""

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]
        if now.number > stage:
            return apart(weights)(rounds)
        w = shares(weights, now.parts)
        mean = {m: sum(x * _np(p.full[f"{m}.weight"]) for x, p in zip(w, now.parts, strict=True)) for m in now.setup.shapes}
        return changed(now, lambda m: cut(mean[m], rank) if now.number == stage else mean[m])

    return rule


def nested(weights: Weights) -> Rule:
    """mFedLoRU: the changes of a small client's factors, carried back through P and its pseudo-inverse, join the large ones."""

    def change(p: Part, old: Factors, m: str) -> tuple[np.ndarray, np.ndarray]:
        start, done = p.start[SHARED], p.done[SHARED]
        dQ, dL = _np(done.A[m]) - _np(start.A[m]), _np(done.B[m]) - _np(start.B[m])
        # The rows of Q are orthonormal.
        P = np.eye(len(dQ)) if len(dQ) == len(old.A[m]) else _np(old.A[m]) @ _np(start.A[m]).T
        return dL @ np.linalg.pinv(P), P @ dQ

    return moved(weights, change)


def by_slice(weights: Weights, ranks: Sequence[int]) -> Rule:
    """raFLoRA: of each slice between two ranks of the federation the mean over those who have it, the sum cut to the largest rank;
    a slice that nobody here has stays as the server had it."""

    def rule(rounds: Sequence[Round]) -> Dense:
        now = rounds[-1]
        levels = [0, *sorted(set(ranks))]

        def weight(m: str) -> np.ndarray:
            out = np.zeros(now.setup.shapes[m])
            for low, high in itertools.pairwise(levels):
                have = [p for p in now.parts if len(p.done[SHARED].A[m]) >= high]
                own = [(w, p.done[SHARED]) for w, p in zip(shares(weights, have), have, strict=True)] if have else []
                for w, f in own or [(1.0, now.before.slots[SHARED])]:
                    out += w * f.scale * _np(f.B[m])[:, low:high] @ _np(f.A[m])[low:high]
            return cut(out, levels[-1])

        return changed(now, weight)

    return rule


def over_all_known(role: str) -> Rule:
    """CE-LoRA's model of nobody: the mean of what each client sent last, whoever takes part now."""

    def rule(rounds: Sequence[Round]) -> Dense:
        last = {p.reply.client.id: p.done[SHARED].role(role) for each in rounds for p in each.parts}
        return {f"{role} of {m}": np.mean([_np(x[m]) for x in last.values()], axis=0) for m in rounds[-1].setup.shapes}

    return rule


def mean_of(terms: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    return sum(w * x for w, x in terms) / sum(w for w, _ in terms)


def tasks_of(client: Client) -> list[str]:
    return list(client.domains) or [""]


def by_task(uniform: bool) -> Rule:
    """FL-TAC where clusters are the tasks: who takes part gets the means of its tasks' adapters of this round, and keeps them."""

    def rule(rounds: Sequence[Round]) -> Dense:
        held: dict[tuple[int, str], Mapping[str, np.ndarray]] = {}
        every = {task for c in rounds[-1].setup.clients for task in tasks_of(c)}
        for now in rounds:
            trained = [(p.reply.client, ask.data, done.slots[SHARED]) for p in now.parts for ask, done in p.asked]
            for client in [p.reply.client for p in now.parts]:
                for task in tasks_of(client):
                    own = len(trained) <= len(every)  # then each adapter is a cluster of its own
                    alike = [x for x in trained if x[1] == task and (not own or x[0] == client)]
                    same = [(1.0 if uniform else c.domains[task], f) for c, _, f in alike]
                    B = {m: mean_of([(w, _np(f.B[m])) for w, f in same]) for m in now.setup.shapes}
                    A = {m: mean_of([(w, _np(f.A[m])) for w, f in same]) for m in now.setup.shapes}
                    held[client.id, task] = {m: same[0][1].scale * B[m] @ A[m] for m in B}
        out: Dense = {}
        for id in sorted({id for id, _ in held}):
            own = {task: change for (i, task), change in held.items() if i == id}
            for m in rounds[-1].setup.shapes:
                out[f"client {id}: {m}.weight"] = sum(change[m] for change in own.values())
                out |= {f"client {id}: {m}.{task}": change[m] for task, change in own.items() if len(own) > 1}
        return out

    return rule


def experts_by_task(uniform: bool) -> Rule:
    """FedLEASE where clusters are the tasks: warm-ups apart until all have one, or three when half of the run is over; then the
    means of a cluster; after that the changes of an expert and of its router are averaged over who trained them. Who comes late
    warms up first."""

    def rule(rounds: Sequence[Round]) -> Dense:
        setup = rounds[-1].setup
        warm: dict[int, Any] = {}
        experts: dict[str, dict[tuple[str, str], np.ndarray]] = {}
        scale = 1.0

        def mean(terms: Sequence[tuple[Client, np.ndarray]]) -> np.ndarray:
            return mean_of([(1.0 if uniform else c.num_examples, x) for c, x in terms])

        for now in rounds:
            here = [(p.reply.client, *p.asked[-1]) for p in now.parts]
            if experts:
                late = [c.id for c, _, _ in here if c.id not in warm]
                warm |= dict.fromkeys(late)
                here = [each for each in here if each[0].id not in late]
                for task in {tasks_of(c)[0] for c, _, _ in here}:
                    own = [(c, ask, done) for c, ask, done in here if tasks_of(c)[0] == task]
                    for m in setup.shapes:
                        for role in ("A", "B"):
                            moved = [
                                (c, _np(done.slots[a.gate.own].role(role)[m]) - _np(a.slots[a.gate.own].role(role)[m]))
                                for c, a, done in own
                            ]
                            experts[task][role, m] = experts[task][role, m] + mean(moved)
                        turned = [(c, _np(done.gate.G[m]) - _np(a.gate.G[m])) for c, a, done in own]
                        router = experts[task].get(("G", m), _np(own[0][1].gate.G[m]))
                        experts[task]["G", m] = router + mean(turned)
                continue
            warm |= {c.id: done.slots[SHARED] for c, _, done in here}
            scale = next(iter(warm.values())).scale
            if len(warm) == len(setup.clients) or (now.number >= setup.rounds // 2 and len(warm) >= 3):
                for task in sorted({tasks_of(c)[0] for c in setup.clients}):
                    own = [c for c in setup.clients if tasks_of(c)[0] == task and c.id in warm]
                    experts[task] = {
                        (role, m): mean([(c, _np(warm[c.id].role(role)[m])) for c in own])
                        for role in ("A", "B")
                        for m in setup.shapes
                    }
        out: Dense = {}
        for c in [c for c in setup.clients if c.id in warm]:
            for m in setup.shapes:
                if experts:
                    own = experts[tasks_of(c)[0]]
                    out[f"client {c.id}: {m}.weight"] = scale * own["B", m] @ own["A", m]
                    out |= {f"client {c.id}: {m}.router": own["G", m]} if ("G", m) in own else {}
                else:
                    out[f"client {c.id}: {m}.weight"] = scale * _np(warm[c.id].B[m]) @ _np(warm[c.id].A[m])
        return out

    return rule


def of(setup: Setup, number: int, before: Model, log: Sequence[Any], bases: Mapping[int, Any], replies: Sequence[Reply]) -> Round:
    """A round as the toy trainer's log has it: of each client the first start and the last outcome that is no probe."""
    parts = []
    for reply in replies:
        own = [(ask, done) for client, ask, done in log if client.id == reply.client.id and not ask.probe]
        full = {n: x for n, x in own[-1][1].full.items()} if any(slot == BASE for slot, _ in own[-1][0].roles) else {}
        parts.append(Part(own[0][0].slots, own[-1][1].slots, full, own, bases[reply.client.id], reply))
    return Round(setup, number, before, parts)
