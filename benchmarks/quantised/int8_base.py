"""What `quantise: int8` saves and costs: memory and time of a training step, and losses.

The step is that of two layers of Moshi 7B's shapes with random weights, LoRA and TTT. The losses are those of
the demo's tiny Moshi, trained as a whole first: as it is and rounded, before and after the same fine-tuning
(LoRA and TTT) on the same chunks from the same seeds.
"""

import copy
import tempfile
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from benchmarks.epoch import QUICK_DEMO
from benchmarks.memory import peak_bytes
from benchmarks.model import training_step
from finetune.args import TrainArgs
from finetune.base_model.codec import load_codec
from finetune.base_model.int8_linear import quantise_base
from finetune.base_model.locate import find_model_files
from finetune.config_io import build_args
from finetune.data.batches.dataset import ChunkDataset
from finetune.data.pipeline import build_datasets, build_train_batches, load_recordings
from finetune.demo.assets import DemoAssets, make_demo_assets
from finetune.demo.tiny_moshi import tiny_moshi_config
from finetune.eval import evaluate
from finetune.training.optim import build_optimizer, build_scheduler
from finetune.wrapped_model import build_meta_model, build_model, prepare_model

SIDES: dict[str, Literal["int8"] | None] = {"as it is": None, "int8": "int8"}
_STD = 0.02
_DEMO: dict[str, Any] = {"num_train": 8, "num_eval": 2, "minutes": 1.0, "seed": 0}
_ADAPTED: dict[str, Any] = {
    "lora": {"enable": True, "rank": 8},
    "ttt": {
        "enable": True,
        "layers": "1,3",
        "persistent_states": False,
        "weight_lr_multiplier": 1,
        "alpha_lr_multiplier": 10,
    },
}


def run(settings: Settings) -> dict[str, Any]:
    """Both sides of both measurements in this process."""
    return {"step": _step(settings), "losses": _losses(settings)}


def _step(settings: Settings) -> dict[str, Any]:
    """Peak memory (weights and optimiser included) and time of a training step of one row."""
    lm_kwargs = tiny_moshi_config(text_card=48, card=20)
    if not settings.quick:
        layers = {"num_layers": 2, "depformer_num_layers": 1, "text_card": 2048}
        lm_kwargs = dict(loaders._lm_kwargs) | layers
    ttt = {"enable": True, "layers": "1", "persistent_states": False}
    lora = {"enable": True, "rank": 4 if settings.quick else 64}
    duration_sec = 2.56 if settings.quick else 5.12
    values = {"lora": lora, "ttt": ttt, "duration_sec": duration_sec, "param_dtype": settings.dtype_name}
    args = {name: build_args(TrainArgs, values | {"quantise": side}) for name, side in SIDES.items()}
    model = _random(build_meta_model(args["as it is"], lm_kwargs), settings)
    rounded = copy.deepcopy(model)
    quantise_base(rounded)
    models = {"as it is": model, "int8": rounded}
    codes = torch.randint(20, (1, model.num_codebooks, args["int8"].chunk_frames), device=settings.device)
    optimizers = {name: build_optimizer(one, args[name]) for name, one in models.items()}
    calls = {
        name: partial(training_step, models[name], optimizers[name], codes, args[name]) for name in SIDES
    }
    times = interleaved(calls, settings)
    candidates = {}
    for name, one in models.items():
        weights = _num_bytes(list(one.parameters()))
        kept = weights + _num_bytes(_moments(optimizers[name]))
        candidates[name] = times[name].record() | {
            "weight_bytes": weights,
            "peak_bytes": kept + peak_bytes(calls[name], settings.device),
        }
    return {"num_frames": args["int8"].chunk_frames, "candidates": candidates}


def _random(model: LMModel, settings: Settings) -> LMModel:
    model = model.to_empty(device=settings.device)
    generator = torch.Generator(settings.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=_STD, generator=generator)
    return model


def _moments(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if value.ndim]


def _num_bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _losses(settings: Settings) -> dict[str, Any]:
    """Held-out losses in nats, text and audio together."""
    with tempfile.TemporaryDirectory() as folder:
        demo = make_demo_assets(Path(folder) / "demo", **(QUICK_DEMO if settings.quick else _DEMO))
        return _losses_on(demo, settings)


def _losses_on(demo: DemoAssets, settings: Settings) -> dict[str, Any]:
    num_steps = {"base": 2, "fine_tuning": 2} if settings.quick else {"base": 60, "fine_tuning": 40}
    data = {"train_data": str(demo.train_jsonl), "eval_data": str(demo.eval_jsonl)}
    values: dict[str, Any] = {
        "data": data | {"num_workers": 0, "shuffle": True},
        "do_eval": True,
        "moshi_paths": {"hf_repo_id": str(demo.model_dir)},
        "duration_sec": 2.56 if settings.quick else 10.24,
        "batch_size": 4,
        "param_dtype": settings.dtype_name,
        "gradient_checkpointing": False,
        "optim": {"lr": 2e-3, "pct_start": 0.1},
    }
    args = build_args(TrainArgs, values | {"full_finetuning": True, "max_steps": num_steps["base"]})
    info = find_model_files(args.moshi_paths)
    base = build_model(args, info, device=settings.device)
    mimi = load_codec(info, settings.device)
    chunks, held_out = build_datasets(args, load_recordings(args), info, base, mimi)
    assert held_out is not None
    _train(base, chunks, args)
    base = base.to(settings.dtype).requires_grad_(False)
    values |= _ADAPTED | {"max_steps": num_steps["fine_tuning"]}
    seeds = (0,) if settings.quick else (0, 1, 2)
    runs = [
        _fine_tuned(base, chunks, held_out, build_args(TrainArgs, values | {"seed": seed})) for seed in seeds
    ]
    return {"steps": num_steps, "runs": runs}


def _fine_tuned(
    base: LMModel, data: ChunkDataset, held_out: ChunkDataset, args: TrainArgs
) -> dict[str, dict[str, float]]:
    """Losses of both sides, and of what trained on the rounded base when it is on the other."""
    losses: dict[str, dict[str, float]] = {}

    def loss_of(model: LMModel) -> float:
        return evaluate(model, held_out, args, device=model.device)["loss"]

    for name, side in SIDES.items():
        model = _adapted(base, args, rounded=side is not None)
        losses[name] = {"before": loss_of(model)}
        _train(model, data, args)
        losses[name]["after"] = loss_of(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = _adapted(base, args, rounded=False)
    plain.load_state_dict(trained, strict=False)
    losses["int8"]["after, on the base as it was"] = loss_of(plain)
    return losses


def _adapted(base: LMModel, args: TrainArgs, *, rounded: bool) -> LMModel:
    model = prepare_model(copy.deepcopy(base), args)
    if rounded:
        quantise_base(model)
    return model


def _train(model: LMModel, data: ChunkDataset, args: TrainArgs) -> None:
    """All steps, every row from `W0`."""
    optimizer = build_optimizer(model, args)
    scheduler = build_scheduler(optimizer, args)
    with closing(build_train_batches(args, data, step=0, num_samples=0, pin_memory=False)) as batches:
        for batch in islice(batches, args.max_steps):
            training_step(model, optimizer, batch.codes.to(model.device), args)
            scheduler.step()
