"""Moshi 7B as a whole, with random weights: a frame of a conversation, a training step, with and without TTT.

Needs a GPU with 80 GB.
"""

import copy
import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from moshi.models import MimiModel, loaders
from moshi.models.lm import LMGen, LMModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from benchmarks.memory import peak_bytes
from benchmarks.moshi_layer import num_parameters
from finetune.args import TrainArgs
from finetune.config_io import build_args, read_yaml
from finetune.demo.tiny_moshi import tiny_moshi_config
from finetune.loss import loss_sums, loss_weights, total_loss
from finetune.training.optim import build_optimizer
from finetune.training.plan.flops import peak_flops, training_flops_per_frame
from finetune.training.plan.gpu_memory import estimate_memory
from finetune.ttt_integration import apply_ttt_to_model
from finetune.wrapped_model import autocast, prepare_model

_EXAMPLE = Path(__file__).parents[1] / "example" / "moshi_7B_ttt.yaml"
_FRAMES_PER_CALL = 25  # 2 s
_QUICK_FRAMES_PER_CALL = 2  # a CUDA graph is captured in the second


def run(settings: Settings) -> dict[str, Any]:
    """A conversation and training, one after the other: together they need more memory than a GPU has."""
    conversation = _conversation(settings)
    gc.collect()
    return {"conversation": conversation, "training": _training(settings)}


def _conversation(settings: Settings) -> dict[str, Any]:
    """Seconds per frame of one conversation: the model (CUDA graphs on a GPU), with TTT, and the codec."""
    args = _example_args(settings)
    stock = _random_model(settings)
    with_ttt = copy.deepcopy(stock)
    layers = apply_ttt_to_model(with_ttt, args.ttt)
    mimi = loaders.get_mimi(None, device=settings.device)
    num_frames = _QUICK_FRAMES_PER_CALL if settings.quick else _FRAMES_PER_CALL
    with ExitStack() as stack, torch.no_grad():
        calls: dict[str, Callable[[], None]] = {}
        for name, lm in {"model": stock, "model with ttt": with_ttt}.items():
            generator = LMGen(lm.requires_grad_(False))
            stack.enter_context(generator.streaming(1))
            calls[name] = partial(_speak, generator, num_frames)
        stack.enter_context(mimi.streaming(1))
        calls["codec"] = partial(_code, mimi, num_frames)
        times = interleaved(calls, settings)
    frame = times["model with ttt"].median / num_frames + times["codec"].median / num_frames
    return {
        "dtype": settings.dtype_name,
        "ttt_layers": layers,
        "frames_per_call": num_frames,
        "parameters": {
            "base": num_parameters(stock.parameters()),
            "all": num_parameters(with_ttt.parameters()),
        },
        "candidates": {name: times[name].record(per=num_frames) for name in calls},
        "with_over_without": times["model with ttt"].median / times["model"].median,
        "real_time_factor": frame * loaders.FRAME_RATE,
    }


def _speak(generator: LMGen, num_frames: int) -> None:
    lm = generator.lm_model
    heard = torch.zeros(1, lm.num_codebooks - lm.dep_q - 1, 1, dtype=torch.long, device=lm.device)
    for _ in range(num_frames):
        generator.step(heard)


def _code(mimi: MimiModel, num_frames: int) -> None:
    """Encode a frame and decode it."""
    silence = torch.zeros(1, 1, mimi.frame_size, device=next(mimi.parameters()).device)
    for _ in range(num_frames):
        mimi.decode(mimi.encode(silence))


def _training(settings: Settings) -> dict[str, Any]:
    """A step of example/moshi_7B_ttt.yaml with one micro-batch, and the same with LoRA alone.

    The peak is that of a whole step on top of nothing, beside what `train.py --dry-run` foresees.
    """
    with_ttt = _example_args(settings)
    configurations = {
        "lora": replace(with_ttt, ttt=replace(with_ttt.ttt, enable=False)),
        "lora + ttt": with_ttt,
    }
    cases = {name: _training_case(args, settings) for name, args in configurations.items()}
    times = interleaved({name: case.step for name, case in cases.items()}, settings)
    peak_rate = peak_flops(settings.device, None)
    lm_kwargs = _lm_kwargs(settings)
    candidates = {}
    for name, args in configurations.items():
        case = cases[name]
        flops = training_flops_per_frame(args, lm_kwargs) * args.batch_size * args.chunk_frames
        candidates[name] = times[name].record() | {
            "trainable_parameters": case.num_trainable,
            "peak_bytes": case.kept_bytes + peak_bytes(case.step, settings.device),
            "estimated_bytes": estimate_memory(args, lm_kwargs, num_gpus=1).peak,
            "model_flops": flops,
            "mfu": None if peak_rate is None else flops / times[name].median / peak_rate,
        }
    return {
        "param_dtype": with_ttt.param_dtype,
        "batch_size": with_ttt.batch_size,
        "num_frames": with_ttt.chunk_frames,
        "gradient_checkpointing": with_ttt.gradient_checkpointing,
        "candidates": candidates,
        "with_over_without": times["lora + ttt"].median / times["lora"].median,
    }


class _TrainingCase(NamedTuple):
    """A prepared model with its optimiser, after its first step."""

    step: Callable[[], None]
    kept_bytes: int  # weights and both moments of AdamW
    num_trainable: int


def _training_case(args: TrainArgs, settings: Settings) -> _TrainingCase:
    base = _random_model(settings, gradient_checkpointing=args.gradient_checkpointing)
    model = prepare_model(base, args)
    optimizer = build_optimizer(model, args)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, model.num_codebooks, args.chunk_frames)
    codes = torch.randint(min(model.card, model.text_card), shape, generator=generator).to(settings.device)
    step = partial(training_step, model, optimizer, codes, args)
    step()  # makes the moments
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = sum(parameter.nbytes for parameter in model.parameters()) + 2 * sum(p.nbytes for p in trainable)
    return _TrainingCase(step, kept, num_parameters(trainable))


def training_step(model: LMModel, optimizer: Optimizer, codes: Tensor, args: TrainArgs) -> None:
    """The trainer's arithmetic, every row from `W0`."""
    weights = loss_weights(codes, model, args)
    with autocast(args, codes.device):
        output = model(codes)
    parts = loss_sums(output, codes, weights, model)
    del output
    total_loss(parts, weights.totals()).backward()
    clip_grad_norm_([p for p in model.parameters() if p.requires_grad], args.max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _random_model(settings: Settings, *, gradient_checkpointing: bool = False) -> LMModel:
    """Moshi's own classes, drawn as torch draws."""
    torch.manual_seed(0)
    return loaders.get_moshi_lm(
        None,
        _lm_kwargs(settings),
        settings.device,
        settings.dtype,
        lm_kwargs_overrides={"gradient_checkpointing": gradient_checkpointing},
    )


def _lm_kwargs(settings: Settings) -> dict[str, Any]:
    return tiny_moshi_config(text_card=48, card=20) if settings.quick else dict(loaders._lm_kwargs)


def _example_args(settings: Settings) -> TrainArgs:
    """One micro-batch; the memory of a recording lives for one chunk."""
    values = read_yaml(_EXAMPLE) | {"num_microbatches": 1, "param_dtype": settings.dtype_name}
    values["ttt"]["persistent_states"] = False
    if settings.quick:
        values |= {"duration_sec": 2.56}
        values["lora"]["rank"] = 4
        values["ttt"]["layers"] = "1,2"
    return build_args(TrainArgs, values)
