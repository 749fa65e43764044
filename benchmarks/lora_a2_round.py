"""LoRA-A2 at rank 1 of 16, probe included: a B-round and an A-round of 30 clients on BANKING77."""

from benchmarks import harness, ours, training
from benchmarks.peers import lora_a2_peft, peft_loop
from fedlora.engine.world import World
from fedlora.methods.lora_a2 import LoRAA2

PEER, GLOBAL_RANK = "LoRA-A2 on PEFT fp32", 16
TARGETS = {PEER: 10.0}


def main(quick: bool = False, limit: int = 600, repetitions: int = 3) -> None:
    """Examples a second (each is passed twice a round), ours against the same method on PEFT's layers."""
    limit, repetitions = (40, 1) if quick else (limit, repetitions)
    world = ours.world(
        {
            "method": {"name": "lora-a2", "global_rank": GLOBAL_RANK},
            "data": {"limit": limit},
            "clients": {"rank": 1} | ({"count": 6} if quick else {}),
            "train": {"rounds": 2 * repetitions},
        }
    )
    measured = measure(world, repetitions)
    rows = harness.speeds(measured, ours.weights(world), TARGETS)
    title = f"lora-a2-round: BANKING77 Dir(0.1), MiniLM, rank 1 of 16, probe included, {limit:,} examples"
    facts = training.facts(world, measured) | {"repetitions": repetitions, "rounds a repetition": 2, "passes a round": 2}
    harness.finish("lora-a2-round", title, rows, facts, quick)


def measure(world: World, repetitions: int) -> harness.Measured:
    """Two rounds a repetition, one of each factor."""
    method = world.method
    assert isinstance(method, LoRAA2) and isinstance(world.config.clients.rank, int)
    peer = lora_a2_peft.LoRAA2Loop(training.peft(world, rank=method.global_rank), world.config.clients.rank)
    start = peft_loop.as_state(world.setup.fresh(method.global_rank))
    sides = {
        training.OURS: ours.side(world, rounds=2, passes=2),
        PEER: lora_a2_peft.side(peer, world.train, start, rounds=2),
    }
    return harness.interleave(sides, repetitions)


if __name__ == "__main__":
    harness.command(main)
