"""Long texts: a round of 30 clients on 20 Newsgroups at 256 tokens, MiniLM, rank 8 on all linear layers."""

from benchmarks import harness, training

TARGETS = {training.FP32: 5.0, training.BF16: 2.0}


def main(quick: bool = False, limit: int = 300, repetitions: int = 3, against: str = "") -> None:
    """Examples a second, ours against PEFT and Flower, on --limit examples split as unevenly as all of them would be; or, with
    --against COMMIT, against an earlier version of ours."""
    limit, repetitions = (40, 1) if quick else (limit, repetitions)
    training.run(
        "train-long",
        f"train-long: 20 Newsgroups Dir(0.1) at 256 tokens, MiniLM, rank 8, batch 32, {limit:,} examples a round",
        {"data": {"source": "20newsgroups", "limit": limit, "max_length": 256}},
        TARGETS,
        repetitions,
        quick,
        against,
    )


if __name__ == "__main__":
    harness.command(main)
