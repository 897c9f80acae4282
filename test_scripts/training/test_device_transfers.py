"""How often a training step and an evaluation wait for the device, and what they keep there."""

import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import finetune.eval
import finetune.training.run
import finetune.training.trainer
from finetune.base_model.codec import load_codec
from finetune.data.batches.dataset import Batch
from finetune.eval import eval_batches, evaluate
from finetune.loss import loss_sums, loss_weights, total_loss
from finetune.training.carried_memory import CarriedMemory
from finetune.training.run import run_training
from finetune.training.trainer import Trainer
from finetune.wrapped_model import build_meta_model, context_frames
from memory_measure import TINY
from run_helpers import TTT, run_args

# What copies values to the host without asking the dispatcher, on a CPU.
_COPIES = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
# What makes the host wait for values of a tensor on a GPU, in backward passes as well.
_WAITING = {
    torch.ops.aten._local_scalar_dense.default,  # item, int, float, bool, `if tensor`
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class _Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in _WAITING or masks:
            self.found.append((str(func), tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Copies to the host; int64 is not counted, since where the batches come from is known on the host."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _COPIES and args[0].dtype != torch.int64:
            self.found.append((func.__name__, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@contextmanager
def transfers():
    """Name and shape of what a GPU would make the host wait for, in the order in which it happens."""
    found = []
    with _Copies(found), _Operations(found):
        yield found


@pytest.mark.parametrize(
    "waits", [bool, float, lambda x: x[x > 0], lambda x: x.nonzero(), torch.Tensor.tolist]
)
def test_what_waits_for_the_device_is_noticed(waits):
    with transfers() as found:
        waits(torch.ones(1))
    assert len(found) == 1


def test_what_waits_in_a_backward_pass_is_noticed():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    x = torch.ones(3, requires_grad=True)
    with transfers() as found:
        Waits.apply(x).sum().backward()
    assert len(found) == 1


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("mode", ["full_ttt", "lora_ttt"])
def test_a_step_that_is_not_logged_fetches_its_losses_and_norms_at_once_and_nothing_else(
    mode, carried, demo, tmp_path, monkeypatch
):
    steps = []
    real_step = Trainer._train_step

    def watched(self, batches):
        loaded = iter([next(batches) for _ in range(2)])  # loading is the host's work, and may look at values
        with transfers() as found:
            result = real_step(self, loaded)
        steps.append(found)
        return result

    monkeypatch.setattr(Trainer, "_train_step", watched)
    settings = {"max_steps": 3, "log_freq": 3, "num_microbatches": 2, "do_ckpt": False, "do_eval": False}
    ttt = TTT | {"persistent_states": carried}
    run_training(run_args(demo, tmp_path / "run", mode, batch_size=1, ttt=ttt, **settings))
    # Two losses, the two totals of their weights, the norm and those of the groups.
    num_groups = 3
    assert steps[1] == [("tolist", (2 + 2 + 1 + num_groups,))]


def test_an_evaluation_waits_as_often_for_many_batches_as_for_few(demo, tmp_path, monkeypatch):
    evaluations = []

    def watched(model, data, args, *, device):
        loaded = list(eval_batches(data, args))
        monkeypatch.setattr(finetune.eval, "eval_batches", lambda *_: loaded)
        with transfers() as found:
            values = evaluate(model, data, args, device=device)
        monkeypatch.setattr(finetune.eval, "eval_batches", eval_batches)
        evaluations.append(found)
        return values

    monkeypatch.setattr(finetune.training.trainer, "evaluate", watched)
    for batch_size in (1, 8):
        run_dir = tmp_path / f"run_{batch_size}"
        run_training(
            run_args(demo, run_dir, "ttt", batch_size=batch_size, max_steps=1, do_ckpt=False, do_eval=True)
        )
    many, few = evaluations
    (rows,) = (shape for name, shape in many if name == "cpu")
    assert rows[0] > 1
    assert [name for name, _ in many] == [name for name, _ in few] == ["cpu", "tolist"]


@pytest.mark.parametrize(("sample_freq", "kept"), [(0, 0), (2, 1)])
def test_the_codec_is_kept_in_memory_only_for_samples(sample_freq, kept, demo, tmp_path, monkeypatch):
    alive = []
    real_step = Trainer._train_step

    def watched(self, batches):
        gc.collect()
        alive.append(sum(codec() is not None for codec in loaded))
        return real_step(self, batches)

    def load(*args):
        codec = load_codec(*args)
        loaded.append(weakref.ref(codec))
        return codec

    loaded = []
    monkeypatch.setattr(finetune.training.run, "load_codec", load)
    monkeypatch.setattr(Trainer, "_train_step", watched)
    settings = {"max_steps": 2, "do_ckpt": False, "do_eval": False, "sample_duration_sec": 1.0}
    run_training(run_args(demo, tmp_path / "run", "ttt", sample_freq=sample_freq, **settings))
    assert len(loaded) == 1
    assert alive == [kept] * 2


class _BlockingCopies(TorchDispatchMode):
    """Copies from the host to a device that wait until all that was launched before is done."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            source = args[0].device
            if torch.device(kwargs.get("device") or source).type != source.type:
                self.found.append(tuple(args[0].shape))
        return func(*args, **kwargs)


@pytest.mark.parametrize("duration_sec", [2.56, 3.2])  # 32 frames are whole mini-batches, 40 are not
def test_no_pass_of_a_training_step_waits_for_the_device(duration_sec, demo, tmp_path, monkeypatch):
    # On the meta device no value exists: whatever asked for one would fail.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    device = torch.device("meta")
    args = run_args(demo, tmp_path / "run", "lora_ttt", duration_sec=duration_sec)
    model = build_meta_model(args, TINY)
    frames, context = args.chunk_frames, context_frames(model)
    memory = CarriedMemory(model, device, chunk_frames=frames)
    on_host = torch.zeros(2, model.num_codebooks, context + frames, dtype=torch.long)
    places = [((0, 1), (0, 0)), ((0, 1), (frames, frames)), ((2, 1), (0, 2 * frames))]
    for recordings, starts in places:
        starts = torch.tensor(starts)
        batch = Batch(on_host, torch.tensor(recordings), starts, starts.clamp(max=context))
        codes, in_front = on_host.to(device), batch.context.to(device)
        with _BlockingCopies() as copies, memory.carried([0, 1], batch):
            weights = loss_weights(codes, model, args, in_front)
            sums = loss_sums(model(codes), codes, weights, model)
            total_loss(sums, weights.totals()).backward()
        memory.commit()
        assert copies.found == []
