"""Three methods on equal terms, over two seeds: a table, and a page with the pictures.

python examples/comparison.py
"""

from own_data import WORDS, tickets

import fedlora

if __name__ == "__main__":
    found = fedlora.compare_methods(
        ["fedit", "ffa-lora", "lora-a2"],
        data=fedlora.Data(tickets(1, 100, list(WORDS)), tickets(2, 40, list(WORDS)), name="tickets"),
        rank=2,
        clients=4,
        alpha=0.1,
        rounds=2,
        seed=[0, 1],
        settings={"train.batch_size": 8, "train.lr": 2e-3},
        title="Tickets over four shops",
    )
    print(found)
    for row in found.rows:
        print(f"{row['method.name']:>10}  seed {row['seed']}  {row['accuracy']:.3f}  {row['upload_bytes'] / 1e6:.2f} MB up")
    print("the page:", found.report())
