"""The quickstart's training as a benchmark runs it."""

from pathlib import Path

from benchmarks.common.settings import Settings
from benchmarks.epoch import DEMO, QUICK_DEMO
from finetune.args import TrainArgs
from finetune.config_io import build_args, read_yaml
from finetune.demo.assets import make_demo_assets

_CONFIG = Path(__file__).parents[1] / "example" / "quickstart.yaml"


def quickstart_args(folder: Path, settings: Settings, *, max_steps: int) -> TrainArgs:
    """`example/quickstart.yaml` on demo data made in `folder`, without logs, evaluation and checkpoints.

    A quick run has smaller batches of shorter chunks.
    """
    demo = make_demo_assets(folder / "demo", **(QUICK_DEMO if settings.quick else DEMO))
    values = read_yaml(_CONFIG)
    if settings.quick:
        values |= {"duration_sec": 2.56, "batch_size": 2}
    values["data"] |= {"train_data": str(demo.train_jsonl), "eval_data": ""}
    return build_args(
        TrainArgs,
        values
        | {
            "moshi_paths": {"hf_repo_id": str(demo.model_dir)},
            "run_dir": str(folder / "run"),
            "max_steps": max_steps,
            "log_freq": 1000,
            "do_eval": False,
            "do_ckpt": False,
            "device": settings.device.type,
        },
    )
