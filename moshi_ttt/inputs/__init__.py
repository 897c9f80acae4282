"""What happens to queries and keys between their projections and the inner loop."""
