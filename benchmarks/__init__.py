"""Measurements of speed and memory, see docs/performance.md."""

import finetune  # noqa: F401  before moshi: it decides whether Moshi compiles its small functions
