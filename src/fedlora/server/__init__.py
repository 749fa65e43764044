"""The server's side of a round: who takes part, the loop, aggregation, scores, checkpoints."""
