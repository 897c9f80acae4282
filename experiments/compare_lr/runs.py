"""Trains the same model twice per seed with the product's own trainer; only the rates differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.tiny_runs import changed, tiny_values, train_to_the_end
from finetune.args import TrainArgs
from finetune.config_io import build_args
from finetune.demo.assets import DemoAssets
from finetune.diagnose.verdict import diagnose_run
from finetune.monitoring.metrics_file import LogRecord, read_records
from finetune.ttt_utils import outer_learning_rates


@dataclass(frozen=True)
class Arm:
    """Outer rates as multiples of that of the base.

    Attributes:
        title: for tables.
        weights: of the TTT weights.
        alpha: of the gates.
    """

    title: str
    weights: float
    alpha: float


ARMS = {"one": Arm("one rate", 1, 1), "three": Arm("three rates", 3, 30)}


def arm_args(
    arm: Arm, demo: DemoAssets, run_dir: Path, *, num_steps: int, batch_size: int, seed: int
) -> TrainArgs:
    """The quickstart's settings with smaller batches, logs at every step and a sample at the end."""
    prompt = next(iter(sorted(demo.eval_jsonl.parent.glob("eval/*.wav"))))
    changes = {
        "data": {"eval_data": str(demo.eval_jsonl)},
        "ttt": {"weight_lr_multiplier": arm.weights, "alpha_lr_multiplier": arm.alpha},
        "batch_size": batch_size,
        "seed": seed,
        "log_freq": 1,
        "do_eval": True,
        "eval_freq": max(1, num_steps // 5),
        "diagnostics": {"freq": max(1, num_steps // 50)},
        "sample_freq": num_steps,
        "sample_prompts": [str(prompt)],
        "sample_duration_sec": 8.0,
    }
    return build_args(TrainArgs, changed(tiny_values(demo, run_dir, num_steps=num_steps), changes))


def run_arm(args: TrainArgs) -> dict[str, Any]:
    """Train as `arm_args` says.

    Returns:
        Rates at their peak; steps with losses and gates; evaluations; findings; the sample's name.

    Raises:
        ConfigError: the run directory is there already.
    """
    problem = train_to_the_end(args)
    run_dir = Path(args.run_dir)
    train, evaluations = (read_records(run_dir, split) for split in ("train", "eval"))
    diagnosis = diagnose_run(run_dir)
    samples = sorted((run_dir / "samples").glob("*.wav"))
    return {
        "seed": args.seed,
        "rates": outer_learning_rates(args),
        "train": _columns(train, ("loss", "text_loss", "audio_loss", "ttt_alpha", "ttt_delta")),
        "eval": _columns(evaluations, ("text_loss", "audio_loss")),
        "gate_opening": {
            where: {"first": values[0], "last": values[-1]}
            for where, (_, values) in diagnosis.series.get("gate_opening", {}).items()
        },
        "findings": list(dict.fromkeys(finding.name for finding in diagnosis.findings)),
        "diverged": problem,
        "sample": str(samples[-1].relative_to(run_dir.parent)) if samples else None,
    }


def _columns(records: Sequence[LogRecord], names: Sequence[str]) -> dict[str, list]:
    columns: dict[str, list] = {"step": [record.step for record in records]}
    return columns | {name: [record.values[name] for record in records] for name in names}
