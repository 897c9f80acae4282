"""What a configuration would train, and the memory it would take, without training."""

from pathlib import Path

import torch
from moshi.models.lm import LMModel

from finetune.args import TrainArgs
from finetune.base_model.locate import find_architecture, find_model_files
from finetune.checkpoint.reading import warm_start
from finetune.data.recordings.sources import parse_sources
from finetune.distributed import set_up_logging
from finetune.training.plan.advice import memory_lines
from finetune.training.plan.summary import model_summary
from finetune.wrapped_model import build_meta_model, build_model

_SMALL_MODEL = 500_000_000  # parameters that any machine can load


def dry_run(args: TrainArgs, *, num_gpus: int = 1, gpu_memory_gb: float | None = None) -> int:
    """Build the model, print its summary and memory, and name what is still missing to train.

    A large model, or one whose files are not here, is built without weights on the meta device.

    Args:
        args: the configuration.
        num_gpus: GPUs that the memory estimate assumes.
        gpu_memory_gb: memory of one of them, 10^9 bytes.

    Returns:
        The exit status: 1 where the run does not fit in `gpu_memory_gb`.
    """
    set_up_logging(lines_to_stdout=False)
    lm_kwargs, source = find_architecture(args.moshi_paths)
    model = build_meta_model(args, lm_kwargs)
    print(f"Architecture: {source}, built without weights")
    if Path(args.moshi_paths.hf_repo_id or "").is_dir() and _num_parameters(model) < _SMALL_MODEL:
        info = find_model_files(args.moshi_paths)
        model = build_model(args, info, device=torch.device("cpu"))
        print("The model is small: its weights were loaded as well")
        if args.init_from is not None and Path(args.init_from).exists():
            print(*warm_start(model, args.init_from, args, info=info).lines, sep="\n")
    for line in model_summary(model, args):
        print(line)
    lines, fits = memory_lines(args, lm_kwargs, num_gpus=num_gpus, gpu_memory_gb=gpu_memory_gb)
    print(*lines, sep="\n")
    _print_missing(args)
    print("Dry run: nothing was trained or written.")
    return 0 if fits else 1


def _print_missing(args: TrainArgs) -> None:
    for key, value in (
        ("run_dir", args.run_dir),
        ("data.train_data", args.data.train_data),
        ("data.eval_data", args.data.eval_data if args.do_eval else "not needed"),
    ):
        if not value:
            print(f"Still to fill in before training: {key}")
    paths = [
        (key, source.path)
        for key, text in (("data.train_data", args.data.train_data), ("data.eval_data", args.data.eval_data))
        if text
        for source in parse_sources(text, key=key)
    ]
    named: list[tuple[str, str | Path | None]] = [
        *paths,
        ("eval.spoken.data", args.eval.spoken.data),
        ("eval.long_context.data", args.eval.long_context.data),
        ("init_from", args.init_from),
    ]
    for key, path in named:
        if path and not Path(path).expanduser().exists():
            print(f"Does not exist yet: {key}: {path}")


def _num_parameters(model: LMModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
