"""Data sets in the layouts of others, made into ours: files in, files out."""
