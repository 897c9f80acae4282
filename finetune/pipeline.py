"""From the `data:` section to loaders: manifests, encoded audio, chunks."""

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from moshi.models import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import FRAME_RATE, CheckpointInfo, get_mimi

from finetune.args import TrainArgs
from finetune.conditions import check_recordings, condition_names
from finetune.data.alignments import load_transcript
from finetune.data.chunks import build_index
from finetune.data.code_cache import CodeCache
from finetune.data.contiguous_sampler import ContiguousBatchSampler
from finetune.data.dataset import Batch, ChunkDataset, build_train_loader
from finetune.data.manifest import Recording, load_manifest
from finetune.data.sampler import GlobalBatchSampler
from finetune.distributed import alike, barrier, get_rank, get_world_size, is_main
from finetune.errors import CheckpointError, ConfigError
from finetune.repository import MOSHI_ERRORS, one_line
from finetune.safe_names import check_counts
from finetune.training_memory import context_frames
from finetune.weight_files import count_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recordings:
    """The checked recordings of a run.

    Attributes:
        train, eval: of the manifests.
        conditions: text conditions by the path of the word timings.
    """

    train: list[Recording]
    eval: list[Recording]
    conditions: dict[Path, dict[str, str]]


def load_recordings(args: TrainArgs) -> Recordings:
    """Read and check the manifests and all word timings; no audio yet.

    Raises:
        ConfigError: a key is not set.
        DataError: a manifest, or what it names, cannot be used.
    """
    if not args.data.train_data:
        raise ConfigError("data.train_data: not set; give a manifest (.jsonl) or a folder of manifests.")
    if args.do_eval and not args.data.eval_data:
        raise ConfigError(
            "data.eval_data: not set, but do_eval is true; give a manifest or set do_eval: false."
        )
    train = load_manifest(args.data.train_data, key="data.train_data")
    evaluation = load_manifest(args.data.eval_data, key="data.eval_data") if args.do_eval else []
    paths = [recording.alignment_path for recording in (*train, *evaluation)]
    conditions = {path: load_transcript(path).text_conditions for path in paths}
    return Recordings(train, evaluation, conditions)


def load_codec(info: CheckpointInfo, device: torch.device) -> MimiModel:
    """The Mimi codec, frozen.

    Raises:
        CheckpointError: its weights are unreadable or do not fit its configuration.
    """
    _check_codec_size(info)
    try:
        return info.get_mimi(device=device).requires_grad_(False)
    except MOSHI_ERRORS as error:
        raise CheckpointError(f"{info.mimi_weights}: cannot be loaded as Mimi: {one_line(error)}") from None


def _check_codec_size(info: CheckpointInfo) -> None:
    """Moshi builds the codec in memory before it reads the weights: see that they are of one size.

    Names are not compared, since Moshi renames tensors of its published files while it loads them.
    """
    source = str(info.mimi_weights)
    held = count_parameters(Path(info.mimi_weights))
    check_counts(info.mimi_config or {}, source=f"configuration of {source}")
    try:
        with torch.device("meta"):
            state = get_mimi(None, info.mimi_config, device="meta").state_dict()
    except MOSHI_ERRORS as error:
        raise CheckpointError(f"{source}: cannot be loaded as Mimi: {one_line(error)}") from None
    announced = sum(tensor.numel() for tensor in state.values())
    if announced > 2 * held:
        raise CheckpointError(
            f"{source}: holds {held:,} parameters, its configuration announces {announced:,}."
        )


def check_codec(mimi: MimiModel, model: LMModel, info: CheckpointInfo) -> None:
    """Compare frame rate and codebooks of codec and model.

    Raises:
        CheckpointError: they do not fit each other.
    """
    if mimi.frame_rate != FRAME_RATE or 2 * mimi.num_codebooks != model.n_q:
        raise CheckpointError(
            f"{info.mimi_weights}: this codec has {mimi.frame_rate:g} frames a second and "
            f"{mimi.num_codebooks} codebooks; this model needs {FRAME_RATE:g} and {model.n_q // 2}, "
            "the same for both voices."
        )


def load_tokenizer(info: CheckpointInfo) -> sentencepiece.SentencePieceProcessor:
    """The text tokenizer.

    Raises:
        CheckpointError: the file is not a sentencepiece model.
    """
    try:
        return info.get_text_tokenizer()
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{info.tokenizer}: not a sentencepiece model: {error}") from None


def build_datasets(
    args: TrainArgs, recordings: Recordings, info: CheckpointInfo, model: LMModel, mimi: MimiModel
) -> tuple[ChunkDataset, ChunkDataset | None]:
    """Encode what is not in the code cache, and cut everything into chunks.

    Every process encodes its share; all of them wait for each other.

    Returns:
        The training chunks, and the evaluation chunks when `do_eval`.

    Raises:
        DataError: a recording cannot be used.
        CheckpointError: the codec does not fit the model.
    """
    check_codec(mimi, model, info)
    cache = CodeCache(
        mimi_weights=Path(info.mimi_weights),
        mimi_config=info.mimi_config,
        num_codebooks=mimi.num_codebooks,
        cache_dir=None if args.data.cache_dir is None else Path(args.data.cache_dir),
    )
    everything = [*recordings.train, *recordings.eval]
    missing = len(cache.missing(everything))
    if missing:
        logger.info("Encoding %d of %d recordings with Mimi, once.", missing, len(everything))
    else:
        logger.info("All %d recordings are encoded already.", len(everything))
    barrier()
    on_terminal = is_main() and sys.stderr.isatty()
    with alike():
        cache.fill(everything, mimi, rank=get_rank(), world_size=get_world_size(), progress=on_terminal)
    tokenizer = load_tokenizer(info)

    context = context_frames(model) if args.carries_memory else 0

    def dataset(part: list[Recording], name: str) -> ChunkDataset:
        frames = [cache.num_frames(recording) for recording in part]
        chunks = build_index(frames, chunk_frames=args.chunk_frames)
        hours = sum(frames) / FRAME_RATE / 3600
        logger.info("%s: %d recordings, %.2f h, %d chunks.", name, len(part), hours, len(chunks))
        paths = [recording.alignment_path for recording in part]
        conditions = [recordings.conditions[path] for path in paths]
        check_recordings(model, zip(paths, conditions, strict=True), source=name)
        return ChunkDataset(
            part,
            chunks,
            cache,
            chunk_frames=args.chunk_frames,
            context_frames=context,
            frame_rate=FRAME_RATE,
            tokenizer=tokenizer,
            text_padding_id=model.text_padding_token_id,
            end_of_text_padding_id=model.end_of_text_padding_id,
            conditions=conditions if condition_names(model) else None,
        )

    train = dataset(recordings.train, "Training data")
    return train, dataset(recordings.eval, "Evaluation data") if args.do_eval else None


def build_train_batches(
    args: TrainArgs, data: ChunkDataset, *, step: int, num_samples: int, pin_memory: bool
) -> Iterable[Batch]:
    """This process's training batches without end, from where a run stands.

    Rows follow recordings where memory is carried (`ttt.persistent_states`); otherwise chunks come in any
    order.

    Args:
        args: the configuration.
        data: the training chunks.
        step: optimiser steps done.
        num_samples: chunks seen, by all processes.
        pin_memory: for copies to a GPU.
    """
    split = {
        "batch_size": args.batch_size,
        "rank": get_rank(),
        "world_size": get_world_size(),
        "seed": args.seed,
        "shuffle": args.data.shuffle,
    }
    if args.carries_memory:
        microbatches = args.num_microbatches
        sampler = ContiguousBatchSampler(data.chunks, num_microbatches=microbatches, start_step=step, **split)
    else:
        sampler = GlobalBatchSampler(len(data), start_sample=num_samples, **split)
    return build_train_loader(data, sampler, num_workers=args.data.num_workers, pin_memory=pin_memory)
