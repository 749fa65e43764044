"""The clients' side: what they keep, what is watched of their training."""
