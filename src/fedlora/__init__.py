"""Federated LoRA fine-tuning: every published method behind one contract."""

__version__ = "0.1.0"
