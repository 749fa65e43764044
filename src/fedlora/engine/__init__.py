"""The round loop, what carries messages, and what a run leaves on disk."""
