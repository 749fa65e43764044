"""Fine-tune on tables of your own, one for each organisation, and end with a PEFT adapter.

python examples/own_data.py
"""

import random
import tempfile
from pathlib import Path

import fedlora

WORDS = {  # what the organisations' tickets are about
    "billing": ["invoice", "refund", "card", "charged twice", "receipt"],
    "delivery": ["parcel", "courier", "late", "address", "tracking number"],
    "account": ["password", "login", "e-mail", "two-factor code", "profile"],
}


def tickets(seed: int, count: int, teams: list[str]) -> list[dict[str, str]]:
    """Rows of a table; a data frame of pandas or polars, or a `datasets.Dataset`, would do as well."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        team = draw.choice(teams)
        rows.append({"text": f"I have a problem with my {draw.choice(WORDS[team])}, please help", "label": team})
    return rows


def main() -> None:
    everybody = list(WORDS)
    shops = {  # the north has hardly any tickets on accounts, the south none on billing
        "north": fedlora.Data(tickets(1, 60, ["billing", "delivery"]) + tickets(2, 5, ["account"]), tickets(3, 30, everybody)),
        "south": fedlora.Data(tickets(4, 60, ["delivery", "account"]), tickets(5, 30, everybody)),
    }
    settings = {"model.head": "shared", "train.batch_size": 8, "train.lr": 2e-3}
    run = fedlora.run(data=shops, model="minilm", method="flora", rank=4, rounds=4, settings=settings)

    print(run)
    for text in ("where is my parcel?", "I was charged twice"):
        (answer,) = run.predict([text])
        print(f"{answer['label']:>10}  {answer['probability']:.2f}  {text}")

    folder = run.save_adapter(Path(tempfile.mkdtemp()) / "adapter")
    print("an adapter that PEFT reads:", sorted(file.name for file in folder.iterdir()))


if __name__ == "__main__":
    main()
