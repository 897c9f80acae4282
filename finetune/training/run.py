"""A training run from its configuration to its plots."""

import logging
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from finetune.args import TrainArgs
from finetune.base_model.codec import load_codec
from finetune.base_model.conditions import check_conditions
from finetune.base_model.fingerprint import base_fingerprint
from finetune.base_model.locate import find_model_files, find_streams, lm_config
from finetune.base_model.streams import Streams
from finetune.checkpoint.data_check import shorten
from finetune.checkpoint.layout import FULL_FILE, run_dir_of
from finetune.checkpoint.reading import find_checkpoint, warm_start
from finetune.checkpoint.resume_check import (
    FROZEN_FACT,
    ResumePoint,
    check_configuration,
    find_resume_point,
    set_aside_newer,
)
from finetune.checkpointing import Checkpointer
from finetune.commands import StopRequest
from finetune.data.batches.dataset import ChunkDataset, Digests
from finetune.data.pipeline import Recordings, build_datasets, load_recordings
from finetune.data.recordings.skipped import SKIPPED_FILE
from finetune.distributed import (
    alike,
    choose_device,
    gather_objects,
    get_world_size,
    is_main,
    num_started,
    process_group,
    set_up_logging,
)
from finetune.errors import ConfigError, UserError
from finetune.eval import unigram_losses
from finetune.evaluation.spoken.items import Benchmark
from finetune.files import hash_json, writing_to
from finetune.monitoring.inner_loop_log import INNER_LOSSES_FILE, read_inner_losses
from finetune.monitoring.metrics_file import MetricsWriter
from finetune.monitoring.plots import plot_run, plot_trajectories
from finetune.monitoring.trajectories import summarise
from finetune.monitoring.wandb_run import check_wandb
from finetune.training.long_context import LongContextEvaluator, check_long_context
from finetune.training.parallel import build_parallel_model, choose_strategy
from finetune.training.plan.flops import utilisation
from finetune.training.plan.summary import model_summary
from finetune.training.run_directory import check_run_dir, lock_existing, make_run_dir
from finetune.training.run_lock import RunLock
from finetune.training.samples import Sampler
from finetune.training.spoken_scores import SpokenEvaluator, load_spoken
from finetune.training.train_state import Saver
from finetune.training.trainer import Trainer
from moshi_ttt.backends import choose_backend

logger = logging.getLogger(__name__)


def run_training(args: TrainArgs) -> None:
    """Train as configured. What can be wrong is checked before anything slow or written.

    Raises:
        UserError: the configuration, the data or a checkpoint cannot be used.
        TrainingDivergedError: a loss, gradient or fast weight is no longer finite.
    """
    set_up_logging()
    if args.resume not in (None, "auto") and not args.run_dir:
        args = replace(args, run_dir=str(run_dir_of(args.resume)))
    check_run_dir(args)
    check_wandb(args)
    strategy = choose_strategy(args, num_started())
    device = choose_device(args.device)
    _check_backend(args, device)
    stop = StopRequest()
    # Slurm's warning may come while the model is still loading; it must not end the process then.
    with (
        stop.on(signal.SIGUSR1),
        process_group(device, alone=strategy == "fsdp"),
        RunLock() as lock,
    ):
        logger.info("Device: %s, processes: %d, strategy: %s", device, get_world_size(), strategy)
        with alike():
            lock_existing(args, lock)
        point = find_resume_point(args)
        if point is not None and point.step >= args.max_steps:
            logger.info("%s is complete: step %d of %d.", point.run_dir, point.step, args.max_steps)
            return
        streams = find_streams(args.moshi_paths)
        _check_kind(args, streams)
        recordings = load_recordings(args, num_voices=streams.num_voices)
        benchmarks = load_spoken(args)
        check_long_context(args)
        if args.init_from is not None and not args.full_finetuning:
            args = _with_base_of(args, args.init_from, point)
        info = find_model_files(args.moshi_paths)
        _train(args, recordings, benchmarks, info, device, point=point, lock=lock, stop=stop)


def _check_kind(args: TrainArgs, streams: Streams) -> None:
    """Refuse what a model that writes text only cannot do."""
    if streams.speaks:
        return
    if args.data.text == "none":
        raise ConfigError("data.text: none leaves nothing to train; this model writes text only (dep_q: 0).")
    for key, value in (
        ("sample_freq", args.sample_freq),
        ("eval.spoken.data", args.eval.spoken.data),
        ("eval.long_context.data", args.eval.long_context.data),
    ):
        if value:
            raise ConfigError(
                f"{key}: {value} needs a model that speaks; this one only writes (dep_q: 0), leave it out."
            )


def _check_backend(args: TrainArgs, device: torch.device) -> None:
    try:
        choose_backend(args.ttt.backend, torch.empty(0, device=device))
    except ValueError as error:
        raise ConfigError(f"ttt.{error}") from None


def _with_base_of(args: TrainArgs, init_from: str, point: ResumePoint | None) -> TrainArgs:
    """Adapters on the full weights of another run need these as their base, here and wherever they go.

    A run that resumes has its base: since it began, the other run may have got another newest checkpoint.
    """
    weights = None
    if point is not None:
        recorded = point.facts["args"]["moshi_paths"]["moshi_path"]
        if recorded is None or Path(recorded).name != FULL_FILE:
            return args
        weights = Path(recorded)
    if weights is None or not weights.is_file():
        weights = find_checkpoint(init_from) / FULL_FILE
    if not weights.is_file():
        return args
    return replace(args, moshi_paths=replace(args.moshi_paths, moshi_path=str(weights.resolve())))


def _train(
    args: TrainArgs,
    recordings: Recordings,
    benchmarks: list[Benchmark],
    info: CheckpointInfo,
    device: torch.device,
    *,
    point: ResumePoint | None,
    lock: RunLock,
    stop: StopRequest,
) -> None:
    _seed_everything(args.seed)
    mimi = load_codec(info, device)
    sampler = Sampler(args, mimi) if args.sample_freq else None
    frozen = [] if point is None else point.frozen
    model = build_parallel_model(
        args, info, device=device, start_from=partial(_start_from, args, info, point, frozen)
    )
    frozen = gather_objects(frozen)[0]  # only the main process starts from weights
    if args.sample_freq:
        check_conditions(model, args.sample_conditions, source="sample_conditions")
    if benchmarks:
        check_conditions(model, args.eval.spoken.conditions, source="eval.spoken.conditions")
    if args.eval.long_context.data is not None:
        check_conditions(model, args.eval.long_context.conditions, source="eval.long_context.conditions")
    train_data, eval_data = build_datasets(args, recordings, info, model, mimi)
    spoken = SpokenEvaluator.build(args, benchmarks, info, model, mimi)
    long_context = LongContextEvaluator.build(args, info, model, mimi)
    del mimi  # only samples still need it
    for line in model_summary(model, args):
        logger.info("%s", line)
    fingerprint = base_fingerprint(info)
    data_facts: dict[str, Any] = {
        "data": _data_facts(train_data),
        "eval_data": None if eval_data is None else _data_facts(eval_data),
    }
    if point is not None:
        paths = [recording.path for recording in train_data.recordings]
        for line in check_configuration(point, args, **data_facts, recordings=paths, info=info):
            logger.info("%s", line)
        if point.run_dir == Path(args.run_dir).resolve():
            set_aside_newer(point)
    unigram = {} if eval_data is None else unigram_losses(train_data, eval_data, model, args)
    with alike():
        run_dir = make_run_dir(args, lock, point)
        if is_main() and args.data.on_error == "skip":
            with writing_to(run_dir / SKIPPED_FILE):
                recordings.skipped.write(run_dir)
    checkpointer = None
    if args.do_ckpt:
        checkpointer = Checkpointer(run_dir, args, lm_config(info), fingerprint, frozen=frozen)
    facts = {**data_facts, "base_fingerprint": fingerprint, FROZEN_FACT: frozen}
    first_step = 1 if point is None else point.step + 1
    run_id = None if point is None else point.facts["wandb_run_id"]
    with MetricsWriter(run_dir, args, first_step=first_step, wandb_run_id=run_id) as writer:
        trainer = Trainer(
            args,
            model,
            train_data=train_data,
            eval_data=eval_data,
            unigram=unigram,
            run_dir=run_dir,
            writer=writer,
            saver=Saver(args, checkpointer, facts),
            frozen=frozen,
            sampler=sampler,
            spoken=spoken,
            long_context=long_context,
            utilisation=utilisation(args, device),
        )
        if point is not None:
            trainer.resume(point)
            logger.info("Resumed from %s.", point.folder)
        trainer.train(stop)
    if is_main():
        _report(args, run_dir)


def _start_from(
    args: TrainArgs, info: CheckpointInfo, point: ResumePoint | None, frozen: list[str], model: LMModel
) -> None:
    """A run that resumes has its weights in the checkpoint; `frozen` gets what a warm start changes."""
    if args.init_from is not None and point is None:
        start = warm_start(model, args.init_from, args, info=info)
        frozen += start.frozen
        for line in start.lines:
            logger.info("%s", line)


def _data_facts(data: ChunkDataset) -> dict[str, Any]:
    """What the position in the data means: which recordings there are, what is in them, and their shares."""
    chunks = [(chunk.recording, chunk.num_frames) for chunk in data.chunks]
    return {
        "num_recordings": len(data.recordings),
        "chunks": len(chunks),
        "lengths": hash_json(chunks)[:16],
        "names": hash_json([recording.path.name for recording in data.recordings])[:16],
        **{name: shorten([getattr(d, name) for d in data.digests]) for name in Digests._fields},
        "shares": [[share.size, share.weight] for share in data.shares(of_recordings=True)],
    }


def _report(args: TrainArgs, run_dir: Path) -> None:
    try:
        written = plot_run(run_dir)
        record = run_dir / INNER_LOSSES_FILE
        if record.exists() and record.stat().st_size:
            written += _report_inner_losses(args, record)
        logger.info("Plots: %s", ", ".join(str(path) for path in written))
    except (OSError, UserError) as error:
        logger.error("The plots cannot be written (%s); everything else is saved.", error)
    logger.info("Everything of this run is in %s; curves: tensorboard --logdir %s", run_dir, run_dir / "tb")


def _report_inner_losses(args: TrainArgs, record: Path) -> list[Path]:
    step, losses = read_inner_losses(record)
    for index, part in losses.items():
        summary = summarise(part)
        logger.info(
            "Inner loop at step %d, layer %d: W0 > before > after at %.2f %% of frames, gain per step %.3g.",
            step,
            index,
            100 * summary.share_ordered,
            summary.gain_per_step,
        )
    if not args.ttt.save_inner_loop_plots:
        return []
    return plot_trajectories(losses, record.parent / args.ttt.inner_loop_plot_dir, title=f"step {step}")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
