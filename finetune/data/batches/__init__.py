"""From encoded recordings to batches: chunks, their order, their tokens."""
