"""A base model in int8 beside the same in floats."""
