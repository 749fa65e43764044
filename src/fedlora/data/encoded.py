"""Examples as a model takes them, made once."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """n examples of one client or one test set.

    Attributes:
        inputs: what the model is given of each: token ids (length,) int32, or the array of an image.
        targets: what is to be said of each, (n,): the index of its class, a number, or how many tokens the loss is on.
        sizes: how many rows each is in the model's layers, (n,): its tokens.
        domains: (n,), the place of each example's domain among the run's; empty in a run of one domain.
        cut: of a whole part as it was encoded, how many examples were longer than allowed.
        unknown: of such a part, the share of tokens that the tokenizer does not know (a text without any counts as one).
        trained: of each, which of its tokens the loss is on, (length,) bool; empty where it is on none. The first token, which
            nothing stands before, is never one of them.
        choices: of each, the answers among which the likeliest is to be found, as examples, the right one first; empty where
            there are none.
    """

    inputs: tuple[np.ndarray, ...]
    targets: np.ndarray
    sizes: np.ndarray
    domains: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    cut: int = 0
    unknown: float = 0.0
    trained: tuple[np.ndarray, ...] = ()
    choices: tuple["Encoded", ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return int(self.sizes.sum())

    @property
    def domain_index(self) -> np.ndarray:
        """`domains`, and zeros in a run of one."""
        return self.domains if len(self.domains) else np.zeros(len(self), dtype=np.int64)

    def take(self, where: np.ndarray) -> "Encoded":
        """The examples at these positions."""
        domains = self.domains[where] if len(self.domains) else self.domains
        trained = tuple(self.trained[i] for i in where) if self.trained else ()
        choices = tuple(self.choices[i] for i in where) if self.choices else ()
        inputs = tuple(self.inputs[i] for i in where)
        return Encoded(inputs, self.targets[where], self.sizes[where], domains, trained=trained, choices=choices)
