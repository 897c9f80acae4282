"""A small Moshi of recorded human dialogues: what its memory adds beyond the window, on others' dialogues."""
