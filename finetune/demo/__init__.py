"""A complete small stand-in for Moshi and its data, made locally: `python -m finetune.demo`.

Kept free of imports: the processes that synthesise speech import this package and must start quickly.
"""
