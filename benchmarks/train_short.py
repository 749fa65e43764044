"""Short texts: a round of 30 clients on BANKING77, MiniLM, rank 8 on all linear layers."""

from benchmarks import harness, training

TARGETS = {training.FP32: 10.0, training.BF16: 4.5, training.FLOWER: 10.0}


def main(quick: bool = False, limit: int = 1500, repetitions: int = 3, against: str = "") -> None:
    """Examples a second, ours against PEFT and Flower, on --limit examples split as unevenly as all of them would be; or, with
    --against COMMIT, against an earlier version of ours."""
    limit, repetitions = (120, 1) if quick else (limit, repetitions)
    training.run(
        "train-short",
        f"train-short: BANKING77 Dir(0.1), MiniLM, rank 8, batch 32, {limit:,} examples a round",
        {"data": {"source": "banking77", "limit": limit}},
        TARGETS,
        repetitions,
        quick,
        against,
    )


if __name__ == "__main__":
    harness.command(main)
