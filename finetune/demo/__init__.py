"""A complete small stand-in for Moshi and its data, made locally: `python -m finetune.demo`."""
