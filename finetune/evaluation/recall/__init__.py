"""What a model remembers: whether it finds the right answer likelier than others, by the time in between."""
