"""Command line: `python -m finetune.data.encode MANIFEST`, the codes of a data set ahead of training.

Training encodes what is missing itself; this does it on machines and at times of your own.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from moshi.models import MimiModel
from tqdm import tqdm

from finetune.args import ModelPaths, TrainArgs
from finetune.base_model.codec import load_codec
from finetune.base_model.locate import find_model_files
from finetune.checkpoint.reading import open_checkpoint
from finetune.commands import Parser, run_command
from finetune.config_io import load_train_args
from finetune.data.audio.find import printable
from finetune.data.codes.cache import CodeCache
from finetune.data.codes.code_file import CacheError, CorruptCodesError
from finetune.data.codes.leftovers import remove_leftovers
from finetune.data.processes import run_tasks
from finetune.data.recordings.lines import Fault, Recording, read_manifest, to_recording
from finetune.distributed import ConsoleHandler, choose_device
from finetune.errors import ConfigError, DataError, UserError

logger = logging.getLogger(__name__)

_LONGEST_SEC = 10**9  # what a manifest may say without upsetting the progress bar: 30 years


class EncodedRecording(NamedTuple):
    """What became of a recording: encoded now, there before, or why it cannot be used."""

    now: bool
    problem: str | None


class Codec(NamedTuple):
    """Where the codec comes from and where codes go; what a worker needs to know."""

    paths: ModelPaths
    cache_dir: str | None
    cache_key: str

    def load(self, device: torch.device) -> tuple[MimiModel, CodeCache]:
        """The codec, and the cache that training with it uses; raises DataError or CheckpointError."""
        info = find_model_files(self.paths)
        mimi = load_codec(info, device)
        cache = CodeCache.of_model(
            info, num_codebooks=mimi.num_codebooks, cache_dir=self.cache_dir, key=self.cache_key
        )
        return mimi, cache


def encode(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, see `python -m finetune.data.encode --help`.

    Returns:
        The exit status: 1 where recordings cannot be used, or with `--verify` have no intact codes.

    Raises:
        UserError: an option, the manifest or the model cannot be used, or the codes cannot be written.
    """
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler()])
    options = _parser().parse_args(arguments)
    args = None if options.config is None else load_train_args(options.config)
    codec = _choose_codec(options, args)
    devices = choose_devices(options.devices)
    faults: list[Fault] = []
    recordings = _read(options.manifest, args, on_fault=faults.append)
    problems = [fault.message for fault in faults]
    _, cache = codec.load(torch.device("cpu"))
    if options.verify:
        return _report(problems + _verify(cache, recordings), f"{len(recordings)} recordings verified")
    folders = {cache.folder(recording) for recording in recordings}
    num_left = remove_leftovers(folders)
    if num_left:
        logger.info("Removed %d unfinished files of an earlier run.", num_left)
    todo, damaged = _look(cache, recordings)
    problems += damaged
    num_before = len(recordings) - len(todo) - len(damaged)
    num_now = 0
    try:
        with closing(_encode_all(codec, todo, devices)) as results:
            for recording, result in results:
                num_now += result.now
                if result.problem is not None:
                    problems.append(recording.fault(result.problem).message)
    finally:
        remove_leftovers(folders)  # of workers that were ended while they wrote
    return _report(problems, f"{len(recordings)} recordings: {num_now} encoded, {num_before} were before")


def choose_devices(text: str) -> list[str]:
    """The devices of `--devices`, one process each.

    Args:
        text: `auto`, all GPUs or else one CPU; or names separated by commas, which may repeat.

    Raises:
        ConfigError: one of them is not here.
    """
    if text == "auto":
        num_gpus = torch.cuda.device_count()
        return [f"cuda:{index}" for index in range(num_gpus)] or [str(choose_device("auto"))]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name == "auto":
            raise ConfigError("--devices: auto stands for all devices, name no others beside it.")
        try:
            choose_device(name)
        except ConfigError as error:
            raise ConfigError(f"--devices: {error}") from None
    return names


def _choose_codec(options: argparse.Namespace, args: TrainArgs | None) -> Codec:
    given = [name for name in ("config", "checkpoint", "base") if getattr(options, name) is not None]
    if not given:
        raise ConfigError("no codec: give the model whose codec it is, --config, --checkpoint or --base.")
    if len(given) > 1 and given != ["checkpoint", "base"]:
        raise ConfigError(f"--{given[0]} and --{given[1]} both name a model; give one of them.")
    cache_dir, key = options.cache_dir, "--cache-dir"
    if args is not None:
        if cache_dir is None:
            cache_dir, key = args.data.cache_dir, "data.cache_dir"
        return Codec(args.moshi_paths, cache_dir, key)
    if options.checkpoint is not None:
        return Codec(open_checkpoint(options.checkpoint, base=options.base).model_paths, cache_dir, key)
    return Codec(ModelPaths(hf_repo_id=options.base), cache_dir, key)


def _read(
    manifest: str | None, args: TrainArgs | None, *, on_fault: Callable[[Fault], None]
) -> list[Recording]:
    """The recordings of the manifest, or those of the configuration; each once."""
    if manifest is not None:
        sources = {"MANIFEST": manifest}
    elif args is not None and args.data.train_data:
        sources = {"data.train_data": args.data.train_data}
        if args.data.eval_data:
            sources["data.eval_data"] = args.data.eval_data
    else:
        raise ConfigError("no data: give a manifest, or a --config that names some in data.train_data.")
    entries = [
        entry for key, text in sources.items() for entry in read_manifest(text, key=key, on_fault=on_fault)
    ]
    by_path = {os.path.abspath(entry.path): entry for entry in reversed(entries)}
    return [to_recording(entry) for entry in reversed(by_path.values())]


def _look(cache: CodeCache, recordings: Sequence[Recording]) -> tuple[list[Recording], list[str]]:
    """The recordings without codes, and what is wrong with the codes that are there."""
    todo, damaged = [], []
    for recording in recordings:
        try:
            if cache.is_encoded(recording):
                cache.entry(recording)
            else:
                todo.append(recording)
        except CorruptCodesError as error:
            damaged.append(recording.fault(str(error)).message)
        except DataError:
            todo.append(recording)  # encoding it will say why
    return todo, damaged


def _encode_all(
    codec: Codec, recordings: Sequence[Recording], devices: Sequence[str]
) -> Generator[tuple[Recording, EncodedRecording], None, None]:
    """Yield what became of each recording, the long ones first."""
    by_length = sorted(recordings, key=lambda recording: -recording.duration_sec)
    total = sum(map(_whole_sec, by_length))
    prepare = partial(_prepare, codec, tuple(devices))
    with (
        tqdm(total=total, unit="s", desc="Encoding audio", disable=not sys.stderr.isatty()) as bar,
        closing(run_tasks(prepare, by_length, num_workers=len(devices))) as outcomes,
    ):
        for recording, result, failure in outcomes:
            if isinstance(result, UserError):
                raise result
            yield recording, result or EncodedRecording(False, failure)
            bar.update(_whole_sec(recording))


def _whole_sec(recording: Recording) -> int:
    return round(min(recording.duration_sec, _LONGEST_SEC))


def _prepare(
    codec: Codec, devices: Sequence[str], number: int
) -> Callable[[Recording], EncodedRecording | UserError]:
    """A worker: the codec on its device."""
    device = choose_device(devices[number])
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    mimi, cache = codec.load(device)
    return partial(_encode_one, cache, mimi)


def _encode_one(cache: CodeCache, mimi: MimiModel, recording: Recording) -> EncodedRecording | UserError:
    try:
        return EncodedRecording(cache.encode(recording, mimi), None)
    except CacheError as error:
        return error  # no recording is to blame: it ends the run
    except DataError as error:
        return EncodedRecording(False, str(error))
    except torch.OutOfMemoryError:
        device = next(mimi.parameters()).device
        return ConfigError(f"--devices: {device} has not enough free memory; free some or name another.")


def _verify(cache: CodeCache, recordings: Sequence[Recording]) -> list[str]:
    """Read all codes and audio files; returns what is wrong."""
    problems = []
    for recording in tqdm(recordings, desc="Verifying", unit="file", disable=not sys.stderr.isatty()):
        try:
            cache.verify(recording)
        except DataError as error:
            problems.append(recording.fault(str(error)).message)
    return problems


def _report(problems: Sequence[str], summary: str) -> int:
    for problem in problems:
        print(printable(problem))
    print(f"{summary}, {len(problems)} cannot be used." if problems else f"{summary}.")
    return 1 if problems else 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m finetune.data.encode",
        description="Encode the recordings of a data set with Mimi ahead of training, which finds them then.",
        epilog="Exit status: 0 all have codes, 1 some cannot be used, 2 nothing can be done. The same "
        "command goes on where another one ended.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "manifest",
        nargs="?",
        metavar="MANIFEST",
        help="a .jsonl file or a folder of manifests, several separated by commas (those of --config)",
    )
    model = parser.add_argument_group("codec", "of the model that will be trained")
    model.add_argument("--config", type=Path, metavar="YAML", help="the configuration of the training")
    model.add_argument("--checkpoint", metavar="PATH", help="a trained model")
    model.add_argument("--base", metavar="PATH", help="a base model: a local folder or a repository")
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="one folder for all codes (that of --config, or beside the audio)"
    )
    parser.add_argument(
        "--devices",
        default="auto",
        metavar="LIST",
        help="cuda:0,cuda:1 or cpu,cpu: a process on each; auto: all GPUs, else the CPU (%(default)s)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="encode nothing; read all codes and audio and compare"
    )
    return parser


if __name__ == "__main__":
    run_command(encode)
