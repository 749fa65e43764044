"""LoRA-A2 at rank 1 of 16, probe included: a B-round and an A-round of 30 clients on BANKING77."""

from benchmarks import harness, ours, training
from benchmarks.against import OURS, version, versions
from benchmarks.peers import lora_a2_peft, peft_loop
from fedlora.methods.lora_a2 import LoRAA2
from fedlora.runs.context import RunContext

PEER, GLOBAL_RANK = "LoRA-A2 on PEFT fp32", 16
TARGETS = {PEER: 10.0}


def main(quick: bool = False, limit: int = 600, repetitions: int = 3, against: str = "") -> None:
    """Examples a second (each is passed twice a round), ours against the same method on PEFT's layers; or, with --against COMMIT,
    against an earlier version of ours."""
    limit, repetitions = (40, 1) if quick else (limit, repetitions)
    tables = {
        "method": {"name": "lora-a2", "global_rank": GLOBAL_RANK},
        "data": {"limit": limit},
        "clients": {"rank": 1} | ({"count": 6} if quick else {}),
    }
    context = ours.context(tables, {"train": {"rounds": 2 * repetitions}})
    if against:
        with versions(against, tables, rounds=2, passes=2) as sides:
            measured = harness.interleave(sides, repetitions)
    else:
        with version(tables, rounds=2, passes=2) as own:
            measured = measure(context, own, repetitions)
    rows = harness.speeds(measured, ours.weights(context), TARGETS)
    title = f"lora-a2-round: BANKING77 Dir(0.1), MiniLM, rank 1 of 16, probe included, {limit:,} examples"
    facts = training.facts(context, measured) | {"repetitions": repetitions, "rounds a repetition": 2, "passes a round": 2}
    harness.finish("lora-a2-round-against" if against else "lora-a2-round", title, rows, facts, quick)


def measure(context: RunContext, own: harness.Side, repetitions: int) -> harness.Measured:
    """Two rounds a repetition, one of each factor."""
    method = context.method
    assert isinstance(method, LoRAA2) and isinstance(context.config.clients.rank, int)
    peer = lora_a2_peft.LoRAA2Loop(training.peft(context, rank=method.global_rank), context.config.clients.rank)
    start = peft_loop.as_state(context.setup.fresh(method.global_rank))
    sides = {OURS: own, PEER: lora_a2_peft.side(peer, context.train, start, rounds=2)}
    return harness.interleave(sides, repetitions)


if __name__ == "__main__":
    harness.command(main)
