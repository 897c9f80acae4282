"""Fine-tuning of Moshi with Test-Time-Training layers, and what one does with the result.

A folder is a room of one subject; what lies directly here is shared by all, or is where people of
moshi-finetune look for it. docs/architecture.md shows the rooms and the ways through them.
"""

import os

# Threads of OpenMP that wait for each other keep their core for long. Where cores are fewer than threads,
# because something else runs too, most of the time is spent so. It counts until torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

# Moshi compiles small functions when it is imported; on a CPU that costs 20 s at the first step.
if not torch.cuda.is_available():
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
