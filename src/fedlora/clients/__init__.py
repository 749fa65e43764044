"""The clients' side: the worker that plays them, what they keep, what is watched of their training."""
