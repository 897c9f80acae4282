"""Configurations of tiny runs on the demo assets, and the command line in this process."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from finetune.args import TrainArgs
from finetune.base_model.fingerprint import base_fingerprint
from finetune.base_model.locate import find_model_files, lm_config
from finetune.checkpoint.layout import list_checkpoints
from finetune.checkpointing import Checkpointer
from finetune.commands import run_command
from finetune.config_io import build_args
from finetune.demo.assets import DemoAssets
from finetune.training.command import train
from finetune.wrapped_model import build_model

TTT = {
    "enable": True,
    "layers": "1,3",
    "mini_batch_size": 16,
    "weight_lr_multiplier": 1,
    "alpha_lr_multiplier": 10,
}
MODES = {
    "full": {"full_finetuning": True},
    "full_ttt": {"full_finetuning": True, "ttt": TTT},
    "lora": {"lora": {"enable": True, "rank": 4}},
    "lora_ttt": {"lora": {"enable": True, "rank": 4}, "ttt": TTT},
    "ttt": {"ttt": TTT},
}


def run_values(demo: DemoAssets, run_dir: Path, mode: str = "lora_ttt", **overrides: Any) -> dict[str, Any]:
    """A configuration as the YAML gives it: three steps of two chunks of 4 s."""
    values = {
        "data": {
            "train_data": str(demo.train_jsonl),
            "eval_data": str(demo.eval_jsonl),
            "shuffle": True,
            "num_workers": 0,
        },
        "moshi_paths": {"hf_repo_id": str(demo.model_dir)},
        "run_dir": str(run_dir),
        "duration_sec": 3.84,
        "batch_size": 2,
        "max_steps": 3,
        "gradient_checkpointing": False,
        "param_dtype": "float32",
        "device": "cpu",
        "optim": {"lr": 1e-3},
    }
    return values | copy.deepcopy(MODES[mode]) | overrides


def run_args(demo: DemoAssets, run_dir: Path, mode: str = "lora_ttt", **overrides: Any) -> TrainArgs:
    """The same as `TrainArgs`."""
    return build_args(TrainArgs, run_values(demo, run_dir, mode, **overrides))


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    """Write a configuration file."""
    with path.open("w") as file:
        YAML().dump(values, file)
    return path


def command_line(monkeypatch: Any, *arguments: str) -> int:
    """Run train.py with these arguments in this process; returns the exit status."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        run_command(train)
    except SystemExit as exit_:
        return exit_.code
    raise AssertionError("run_command returned")


def read_metrics(run_dir: Path, split: str) -> list[dict]:
    """The records of one split."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def final_folder(run_dir: Path) -> Path:
    """What the newest checkpoint of a run has for use."""
    return list_checkpoints(run_dir / "checkpoints")[-1] / "consolidated"


def saved_weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of the consolidated checkpoint of one step."""
    folder = run_dir / "checkpoints" / f"checkpoint_{step:06d}" / "consolidated"
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def write_untrained_run(run_dir: Path, mode: str, base: Path) -> Path:
    """A run directory with one checkpoint, of step 7, whose adapters and gates are open, without training."""
    values = MODES[mode] | {"param_dtype": "float32", "moshi_paths": {"hf_repo_id": str(base)}}
    if "ttt" in values:
        # Elsewhere this path would mean nothing, and here it says whose machine it was.
        plots = {"ttt_layer_context": 25, "inner_loop_plot_dir": str(run_dir / "plots")}
        values["ttt"] = TTT | {"base_lr": 5.0} | plots
    args = build_args(TrainArgs, values | {"run_dir": str(run_dir)})
    info = find_model_files(args.moshi_paths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same model in whatever order tests run
        model = build_model(args, info, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("gating_alpha"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    Checkpointer(run_dir, args, lm_config(info), base_fingerprint(info)).save(model, 7)
    return run_dir


def checkpoint_content(run_dir: Path) -> Path:
    """The folder with the files of such a checkpoint."""
    return run_dir / "checkpoints" / "checkpoint_000007" / "consolidated"
