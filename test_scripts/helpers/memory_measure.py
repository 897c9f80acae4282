"""The peak of real training steps, as the allocator reports it to torch's profiler."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile

from finetune.args import TrainArgs
from finetune.demo.tiny_moshi import tiny_moshi_config
from finetune.loss import loss_sums, loss_weights, total_loss
from finetune.training.optim import build_optimizer
from finetune.wrapped_model import autocast, build_meta_model


def real_model(args: TrainArgs, lm_kwargs: dict) -> torch.nn.Module:
    """A prepared model whose weights are all 0.01: drawing random ones for layers of 7B takes minutes."""
    model = build_meta_model(args, lm_kwargs)
    for module in model.modules():
        for name, meta in module._parameters.items():
            if meta is not None:
                weight = torch.full(meta.shape, 0.01, dtype=meta.dtype)
                module._parameters[name] = torch.nn.Parameter(weight, requires_grad=meta.requires_grad)
    return model


def train_step(model, args: TrainArgs, optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step on random codes, the trainer's arithmetic without its logs."""
    optimizer.zero_grad(set_to_none=True)
    for _ in range(args.num_microbatches):
        codes = torch.randint(model.card, (args.batch_size, model.num_codebooks, args.chunk_frames))
        weights = loss_weights(codes, model, args)
        with autocast(args, torch.device("cpu")):
            output = model(codes)
        parts = loss_sums(output, codes, weights, model)
        del output
        total_loss(parts, weights.totals()).backward()
        del parts
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


def measured_peak(args: TrainArgs, lm_kwargs: dict, *, num_steps: int = 2) -> int:
    """Bytes of weights and of the most that was allocated on top of them during some steps."""
    model = real_model(args, lm_kwargs)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = build_optimizer(model, args)
    # oneDNN packs bfloat16 weights into buffers of its own on some processors.
    onednn = torch.backends.mkldnn.flags(enabled=False)
    gc.collect()  # what others left behind would be released in between, and count as memory given back
    with onednn, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(num_steps):
            train_step(model, args, optimizer)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


TINY = tiny_moshi_config(text_card=512, card=64)
