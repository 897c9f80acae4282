"""New models from a base model: another text tokenizer, the user's stream predicted."""
