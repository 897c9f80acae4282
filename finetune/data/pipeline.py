"""From the `data:` section to loaders: manifests, encoded audio, chunks."""

import logging
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

from moshi.models import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import FRAME_RATE, CheckpointInfo
from torch import Tensor

from finetune.args import TrainArgs
from finetune.base_model.codec import check_codec
from finetune.base_model.conditions import check_recordings, condition_names
from finetune.base_model.locate import lm_config
from finetune.base_model.streams import model_streams, text_delay_frames
from finetune.base_model.text import load_tokenizer
from finetune.data.audio.checks import check_frames
from finetune.data.batches.chunks import build_index
from finetune.data.batches.contiguous_sampler import ContiguousBatchSampler
from finetune.data.batches.dataset import Batch, ChunkDataset, Digests
from finetune.data.batches.loader import build_train_loader
from finetune.data.batches.shuffled_sampler import GlobalBatchSampler
from finetune.data.check.fast import refuse_faulty
from finetune.data.codes.cache import CodeCache
from finetune.data.codes.code_file import CacheError, CodeEntry
from finetune.data.codes.encode_audio import encode_silence
from finetune.data.codes.leftovers import remove_leftovers
from finetune.data.codes.mono import MonoPolicy, Voices, mono_error, mono_policy
from finetune.data.recordings.hours import limits_of, take_hours
from finetune.data.recordings.lines import Fault, Recording, check_manifest, raise_first
from finetune.data.recordings.skipped import CheckedSource, SkipList
from finetune.data.recordings.sources import DataSource, parse_sources, refuse_weights
from finetune.data.text_report import refuse_wordless, report_text
from finetune.data.words import TimingFile, look_at_timings
from finetune.distributed import alike, barrier, gather_objects, get_rank, get_world_size, is_main
from finetune.errors import ConfigError, DataError
from finetune.wrapped_model import context_frames

logger = logging.getLogger(__name__)
_SETTLED_FRAMES = 250  # of silence, after which its codes no longer change


@dataclass(frozen=True)
class Recordings:
    """The checked recordings of a run.

    Attributes:
        train: in the order of their sources.
        eval: none without `do_eval`.
        weights: shares of the sources of `train`; one source has 1.
        skipped: what was left out; more may follow when audio is encoded.
        timings: what the files with word timings hold beside the words, by their path.
    """

    train: list[Recording]
    eval: list[Recording]
    weights: Sequence[float] = (1.0,)
    skipped: SkipList = field(default_factory=SkipList)
    timings: dict[Path, TimingFile] = field(default_factory=dict)


def load_recordings(args: TrainArgs, *, num_voices: int = 2) -> Recordings:
    """Read and check the manifests and all word timings; no audio yet.

    Args:
        args: the configuration.
        num_voices: that the model knows.

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
    skipped = SkipList()
    sources = parse_sources(args.data.train_data, key="data.train_data")
    mono = mono_policy(args.data.mono, num_voices=num_voices)
    train = _load(args, sources, "train", skipped, mono)
    limits = limits_of(args.data.max_hours, sources)
    train = take_hours(train, sources, limits, seed=args.seed)
    evaluation = []
    if args.do_eval:
        eval_sources = parse_sources(args.data.eval_data, key="data.eval_data")
        refuse_weights(eval_sources, key="data.eval_data")
        evaluation = _load(args, eval_sources, "eval", skipped, mono)
    paths = [recording.alignment_path for recording in (*train, *evaluation)]
    timings = {path: _look_at_timings(path, args) for path in paths}
    for part, key in ((train, "data.train_data"), (evaluation, "data.eval_data")):
        refuse_wordless([timings[r.alignment_path].num_words for r in part], args.text_options, key=key)
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return Recordings([replace(r, source=0) for r in train], evaluation, (1.0,), skipped, timings)
    return Recordings(train, evaluation, weights, skipped, timings)


def _look_at_timings(path: Path, args: TrainArgs) -> TimingFile:
    if args.data.text == "none" and not path.exists():
        return TimingFile()
    return look_at_timings(path)


def _load(
    args: TrainArgs, sources: Sequence[DataSource], split: str, skipped: SkipList, mono: MonoPolicy
) -> list[Recording]:
    faults: list[Fault] = []
    check = partial(refuse_faulty, mono=mono, text=args.text_options)
    recordings = check_manifest(
        sources,
        key=f"data.{split}_data",
        on_fault=faults.append,
        check=check,
        need_words=args.data.text != "none",
    )
    return _usable(args, CheckedSource(recordings, faults), split, skipped)


def _usable(args: TrainArgs, checked: CheckedSource, split: str, skipped: SkipList) -> list[Recording]:
    """The recordings that can be used, by the policy `data.on_error`."""
    key = f"data.{split}_data"
    if args.data.on_error == "raise":
        raise_first(checked.faults, source=getattr(args.data, f"{split}_data"))
        return checked.usable
    return skipped.leave_out(checked, key=key)


def build_datasets(
    args: TrainArgs, recordings: Recordings, info: CheckpointInfo, model: LMModel, mimi: MimiModel
) -> tuple[ChunkDataset, ChunkDataset | None]:
    """Encode what is not in the code cache, and cut everything into chunks.

    Every process encodes its share; all of them wait for each other. What cannot be encoded joins
    `recordings.skipped` where `data.on_error` says so.

    Returns:
        The training chunks, and the evaluation chunks when `do_eval`.

    Raises:
        DataError: a recording cannot be used.
        CheckpointError: the codec does not fit the model.
    """
    check_codec(mimi, model, info)
    cache = CodeCache.of_model(info, num_codebooks=mimi.num_codebooks, cache_dir=args.data.cache_dir)
    parts = (
        {"train": recordings.train, "eval": recordings.eval} if args.do_eval else {"train": recordings.train}
    )
    mono = mono_policy(args.data.mono, num_voices=model_streams(model).num_voices)
    reasons = _encode(args, cache, [recording for part in parts.values() for recording in part], mimi, mono)
    frames: dict[str, dict[Recording, CodeEntry]] = {}
    with alike():
        looked = {split: look_up(mono, cache, part, reasons) for split, part in parts.items()}
    for split, (checked, entries) in looked.items():
        usable = _usable(args, checked, split, recordings.skipped)
        frames[split] = {recording: entries[recording] for recording in usable}
    used = [entry for part in frames.values() for entry in part.values()]
    text_delay = text_delay_frames(lm_config(info))
    voices = Voices(cache, mono, silence=_silence(mono, used, mimi, tail=text_delay))
    tokenizer = load_tokenizer(info, lm_config(info))
    context = context_frames(model) if args.carries_memory else 0

    def dataset(split: str, name: str, weights: Sequence[float]) -> ChunkDataset:
        num_frames = [entry.num_frames + text_delay for entry in frames[split].values()]
        chunks = build_index(num_frames, chunk_frames=args.chunk_frames)
        hours = sum(num_frames) / FRAME_RATE / 3600
        logger.info("%s: %d recordings, %.2f h, %d chunks.", name, len(num_frames), hours, len(chunks))
        paths = [recording.alignment_path for recording in frames[split]]
        timings = [recordings.timings[path] for path in paths]
        conditions = [timing.text_conditions for timing in timings]
        check_recordings(model, zip(paths, conditions, strict=True), source=name)
        data = ChunkDataset(
            list(frames[split]),
            chunks,
            voices,
            chunk_frames=args.chunk_frames,
            context_frames=context,
            frame_rate=FRAME_RATE,
            tokenizer=tokenizer,
            text_padding_id=model.text_padding_token_id,
            end_of_text_padding_id=model.end_of_text_padding_id,
            conditions=conditions if condition_names(model) else None,
            source_weights=weights,
            digests=[
                Digests(timing.digest, entry.source_digest, entry.content_digest)
                for timing, entry in zip(timings, frames[split].values(), strict=True)
            ],
            text_options=args.text_options,
            text_delay_frames=text_delay,
        )
        num_words = [timing.num_words for timing in timings]
        report_text(data, num_words, key=f"data.{split}_data", name=name)
        return data

    train = dataset("train", "Training data", recordings.weights)
    missing = set(range(len(recordings.weights))) - {recording.source for recording in train.recordings}
    if missing:
        path = parse_sources(args.data.train_data, key="data.train_data")[min(missing)].path
        raise DataError(f"data.train_data: {path} has a weight, but no recording of it can be used.")
    return train, dataset("eval", "Evaluation data", (1.0,)) if args.do_eval else None


def _encode(
    args: TrainArgs, cache: CodeCache, recordings: Sequence[Recording], mimi: MimiModel, mono: MonoPolicy
) -> dict[Recording, str]:
    """Encode this process's share; returns why what cannot be encoded cannot."""
    missing = len(cache.missing(recordings))
    if missing:
        logger.info("Encoding %d of %d recordings with Mimi, once.", missing, len(recordings))
    else:
        logger.info("All %d recordings are encoded already.", len(recordings))
    if is_main():
        remove_leftovers(cache.folder(recording) for recording in recordings)
    barrier()
    reasons: dict[Recording, str] = {}

    def note(recording: Recording, error: DataError) -> None:
        reasons.setdefault(recording, str(error))

    with alike():
        cache.fill(
            recordings,
            mimi,
            allow_mono=mono != "error",
            on_fault=None if args.data.on_error == "raise" else note,
            rank=get_rank(),
            world_size=get_world_size(),
            progress=is_main() and sys.stderr.isatty(),
        )
    return {recording: reason for part in gather_objects(reasons) for recording, reason in part.items()}


def look_up(
    mono: MonoPolicy, cache: CodeCache, recordings: Sequence[Recording], reasons: Mapping[Recording, str]
) -> tuple[CheckedSource, dict[Recording, CodeEntry]]:
    """What the cache has of the recordings, and which of them training cannot use."""
    entries: dict[Recording, CodeEntry] = {}
    faults: list[Fault] = []
    for recording in recordings:
        if recording in reasons:
            faults.append(recording.fault(reasons[recording]))
            continue
        try:
            entry = cache.entry(recording)
            if entry.channels == 1 and mono == "error":
                raise mono_error(recording.path)
            check_frames(
                recording.path,
                entry.num_frames,
                frame_rate=FRAME_RATE,
                expected_duration_sec=recording.duration_sec,
            )
        except CacheError:
            raise
        except DataError as error:
            faults.append(recording.fault(str(error)))
        else:
            entries[recording] = entry
    return CheckedSource(list(entries), faults), entries


def _silence(mono: MonoPolicy, entries: Sequence[CodeEntry], mimi: MimiModel, *, tail: int) -> Tensor | None:
    """Codes of silence beside the longest mono recording, or after the end, where they are needed."""
    if mono == "one_voice" and tail:
        return encode_silence(mimi, _SETTLED_FRAMES + tail)[:, _SETTLED_FRAMES:]
    longest = max((entry.num_frames for entry in entries if entry.channels == 1), default=0)
    return encode_silence(mimi, longest) if longest and mono == "user_silent" else None


class _Split(TypedDict):
    batch_size: int
    rank: int
    world_size: int
    seed: int
    shuffle: bool


def build_train_batches(
    args: TrainArgs, data: ChunkDataset, *, step: int, num_samples: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """This process's training batches without end, from where a run stands; close them when done.

    Rows follow recordings where memory is carried (`ttt.persistent_states`); otherwise chunks come in any
    order.

    Args:
        args: the configuration.
        data: the training chunks.
        step: optimiser steps done.
        num_samples: chunks seen, by all processes.
        pin_memory: for copies to a GPU.
    """
    split: _Split = {
        "batch_size": args.batch_size,
        "rank": get_rank(),
        "world_size": get_world_size(),
        "seed": args.seed,
        "shuffle": args.data.shuffle,
    }
    sampler: Iterable[list[int]]
    if args.carries_memory:
        microbatches = args.num_microbatches
        sampler = ContiguousBatchSampler(
            data.chunks,
            num_microbatches=microbatches,
            start_step=step,
            shares=data.shares(of_recordings=True),
            **split,
        )
    else:
        shares = data.shares(of_recordings=False)
        sampler = GlobalBatchSampler(len(data), start_sample=num_samples, shares=shares, **split)
    return iter(build_train_loader(data, sampler, num_workers=args.data.num_workers, pin_memory=pin_memory))
