"""How often a training step waits for the device."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from finetune.run import run_training
from finetune.trainer import Trainer
from run_helpers import run_args

# What makes the host wait for values of a tensor on a GPU.
_WAITING = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.nonzero,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.nonzero,
    torch.masked_select,
}


class Transfers(TorchFunctionMode):
    """Notes what a GPU would make the host wait for; values known to lie on the host are not counted.

    Attributes:
        found: shapes, by the name of the operation.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _WAITING and args[0].dtype.is_floating_point:
            self.found.append((func.__name__, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["full_ttt", "lora_ttt"])
def test_a_step_that_is_not_logged_fetches_its_losses_and_norms_at_once_and_nothing_else(
    mode, demo, tmp_path, monkeypatch
):
    steps = []
    real_step = Trainer._train_step

    def watched(self, batches):
        with Transfers() as transfers:
            result = real_step(self, batches)
        steps.append(transfers.found)
        return result

    monkeypatch.setattr(Trainer, "_train_step", watched)
    settings = {"max_steps": 3, "log_freq": 3, "num_microbatches": 2, "do_ckpt": False, "do_eval": False}
    run_training(run_args(demo, tmp_path / "run", mode, batch_size=1, **settings))
    # Two losses, the two totals of their weights, the norm and those of the groups.
    num_groups = 3
    assert steps[1] == [("tolist", (2 + 2 + 1 + num_groups,))]
