"""Federated LoRA fine-tuning: every published method behind one contract.

import fedlora
run = fedlora.run(data="tickets.csv", method="lora-a2", rank=4, rounds=10)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedlora.api import Comparison, Run, client, compare_methods, load, run
    from fedlora.data.given import Data
    from fedlora.errors import BadInput, RunFailed

_PLACES = {  # imported when they are asked for: what is behind them takes a second
    **dict.fromkeys(("Comparison", "Run", "client", "compare_methods", "load", "run"), "fedlora.api"),
    "Data": "fedlora.data.given",
    **dict.fromkeys(("BadInput", "RunFailed"), "fedlora.errors"),
}
__all__ = ["BadInput", "Comparison", "Data", "Run", "RunFailed", "__version__", "client", "compare_methods", "load", "run"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module 'fedlora' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
