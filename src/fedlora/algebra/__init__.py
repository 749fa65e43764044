"""Low-rank algebra on plain tensors. Imports nothing of fedlora."""
