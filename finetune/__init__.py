"""Fine-tuning of Moshi with Test-Time-Training layers: configuration, data, training loop."""

import os

import torch

# Moshi compiles small functions when it is imported; on a CPU that costs 20 s at the first step.
if not torch.cuda.is_available():
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
