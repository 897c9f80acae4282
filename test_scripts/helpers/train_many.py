"""Several trainings one after the other in the same processes, since starting them takes long."""

import os
import sys

os.environ["NO_TORCH_COMPILE"] = "1"

import torch

from finetune.config_io import load_train_args
from finetune.distributed import process_group
from finetune.training.run import run_training

if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        for config in sys.argv[1:]:
            run_training(load_train_args(config))
