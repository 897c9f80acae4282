"""A training run from its configuration to its plots."""

import logging
import random
from pathlib import Path

import numpy as np
import torch
from moshi.models.loaders import CheckpointInfo

from finetune.args import TrainArgs
from finetune.checkpointing import Checkpointer
from finetune.distributed import (
    alike,
    choose_device,
    get_world_size,
    is_main,
    process_group,
    set_up_logging,
)
from finetune.loading import find_checkpoint, warm_start
from finetune.monitoring.metrics import MetricsWriter, check_wandb
from finetune.monitoring.plots import INNER_LOSSES_FILE, plot_inner_losses, plot_run
from finetune.pipeline import Recordings, build_datasets, load_codec, load_recordings
from finetune.repository import base_fingerprint, find_model_files, lm_config
from finetune.run_directory import check_run_dir, make_run_dir
from finetune.sampling import Sampler
from finetune.summary import model_summary
from finetune.trainer import Trainer
from finetune.unigram import unigram_losses
from finetune.wrapped_model import build_model

logger = logging.getLogger(__name__)


def run_training(args: TrainArgs) -> None:
    """Train as configured. What can be wrong is checked before anything slow or written.

    Raises:
        UserError: the configuration, the data or a checkpoint cannot be used.
        TrainingDivergedError: a loss, gradient or fast weight is no longer finite.
    """
    set_up_logging()
    check_run_dir(args)
    check_wandb(args)
    device = choose_device(args.device)
    recordings = load_recordings(args)
    if args.init_from is not None:
        find_checkpoint(args.init_from)
    info = find_model_files(args.moshi_paths)
    with process_group(device):
        logger.info("Device: %s, processes: %d", device, get_world_size())
        _train(args, recordings, info, device)


def _train(args: TrainArgs, recordings: Recordings, info: CheckpointInfo, device: torch.device) -> None:
    _seed_everything(args.seed)
    mimi = load_codec(info, device)
    sampler = Sampler(args, mimi) if args.sample_freq else None
    model = build_model(args, info, device=device)
    if args.init_from is not None:
        for line in warm_start(model, args.init_from, args):
            logger.info("%s", line)
    train_data, eval_data = build_datasets(args, recordings, info, model, mimi)
    for line in model_summary(model, args):
        logger.info("%s", line)
    unigram = {} if eval_data is None else unigram_losses(train_data, eval_data, model, args)
    with alike():
        run_dir = make_run_dir(args)
    checkpointer = None
    if args.do_ckpt:
        checkpointer = Checkpointer(run_dir, args, lm_config(info), base_fingerprint(info))
    with MetricsWriter(run_dir, args) as writer:
        trainer = Trainer(
            args,
            model,
            train_data=train_data,
            eval_data=eval_data,
            unigram=unigram,
            run_dir=run_dir,
            writer=writer,
            checkpointer=checkpointer,
            sampler=sampler,
        )
        trainer.train()
    if is_main():
        _report(args, run_dir)


def _report(args: TrainArgs, run_dir: Path) -> None:
    try:
        written = plot_run(run_dir)
        if args.ttt.save_inner_loop_plots and (run_dir / INNER_LOSSES_FILE).exists():
            written += plot_inner_losses(run_dir, run_dir / args.ttt.inner_loop_plot_dir)
        logger.info("Plots: %s", ", ".join(str(path) for path in written))
    except OSError as error:
        logger.error("The plots cannot be written (%s); everything else is saved.", error)
    logger.info("Everything of this run is in %s; curves: tensorboard --logdir %s", run_dir, run_dir / "tb")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
