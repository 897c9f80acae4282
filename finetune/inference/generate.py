"""The work of generate.py: a recording of a user in, a conversation out."""

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sphn
import torch
from torch import Tensor

from finetune.cli import Parser
from finetune.data.audio import read_voice
from finetune.distributed import set_up_logging
from finetune.errors import ConfigError
from finetune.inference.conversation import Conversation, Reply
from finetune.inference.options import (
    add_model_options,
    load_from_options,
    positive_integer,
    sampling_from_options,
)
from finetune.inference.speech_model import SpeechModel
from finetune.inference.timing import FrameTimes
from finetune.interruption import StopRequest
from moshi_ttt.memory import load_ttt_states, save_ttt_states
from moshi_ttt.session import load_session, save_session

logger = logging.getLogger(__name__)


def generate(arguments: Sequence[str]) -> None:
    """Do what the command line says, see `python generate.py --help`.

    Raises:
        UserError: an option, a file or the checkpoint cannot be used.
        StateError: a memory or session cannot be used.
    """
    options = _parse(arguments)
    set_up_logging()
    speech = load_from_options(options)
    user = torch.from_numpy(read_voice(Path(options.input), sample_rate=int(speech.mimi.sample_rate)))
    print(f"model: {speech.source}")
    conversation = Conversation(
        speech.lm, speech.mimi, sampling=sampling_from_options(options), batch_size=options.batch_size
    )
    with conversation:
        _begin(conversation, options)
        times, replies = _talk(speech, conversation, user)
        report = _report(speech, conversation, options, times, replies)
        _write(conversation, options, user, replies, report)
    _print_summary(report)


def _begin(conversation: Conversation, options: argparse.Namespace) -> None:
    conversation.warm_up()
    conversation.start(seed=options.seed)
    if options.load_session is not None:
        load_session(conversation.generator, conversation.mimi, options.load_session)
        print(f"session: goes on from {options.load_session}")
    if options.load_memory is not None:
        load_ttt_states(conversation.lm, options.load_memory)
        print(f"memory: starts from {options.load_memory}")


def _talk(speech: SpeechModel, conversation: Conversation, user: Tensor) -> tuple[FrameTimes, list[Reply]]:
    """Play the user's voice `[num_samples]` to the model, the last frame filled up with silence."""
    times, replies = FrameTimes(), []
    frames = user.split(conversation.mimi.frame_size)
    with StopRequest() as stop:
        for frame in frames:
            frame = torch.nn.functional.pad(frame, (0, conversation.mimi.frame_size - len(frame)))
            with times.frame():
                replies.append(conversation.listen(frame[None]))
            if replies[-1].tokens is not None:
                sys.stdout.write(speech.text_piece(int(replies[-1].tokens[0, 0])))
                sys.stdout.flush()
            if stop.requested:
                print(f"\ninterrupted after {len(replies)} of {len(frames)} frames; they are written", end="")
                break
    print()
    return times, replies


def _report(
    speech: SpeechModel,
    conversation: Conversation,
    options: argparse.Namespace,
    times: FrameTimes,
    replies: Iterable[Reply],
) -> dict[str, Any]:
    tokens = [reply.tokens[:, 0] for reply in replies if reply.tokens is not None]
    rows = torch.stack(tokens, 1).tolist() if tokens else [[]] * options.batch_size
    return {
        "model": speech.source,
        "input": options.input,
        "ttt": options.ttt,
        "device": str(speech.lm.device),
        "dtype": str(speech.lm.dtype).removeprefix("torch."),
        "seed": options.seed,
        "batch_size": options.batch_size,
        **times.summary(),
        "memory_resets": conversation.check_memory(),
        "text": ["".join(map(speech.text_piece, row)).strip() for row in rows],
    }


def _write(
    conversation: Conversation,
    options: argparse.Namespace,
    user: Tensor,
    replies: Sequence[Reply],
    report: dict[str, Any],
) -> None:
    if options.save_memory is not None:
        save_ttt_states(conversation.lm, options.save_memory)
        print(f"memory: saved as {options.save_memory}")
    if options.save_session is not None:
        save_session(conversation.generator, conversation.mimi, options.save_session)
        print(f"session: saved as {options.save_session}")
    answers = torch.cat([reply.audio for reply in replies], 1)  # [B, num_samples]
    user = torch.nn.functional.pad(user, (0, max(0, answers.shape[1] - len(user))))[: answers.shape[1]]
    rate = int(conversation.mimi.sample_rate)
    for row, path in enumerate(_output_paths(Path(options.output), options.batch_size)):
        _write_wav(path, torch.stack([answers[row], user]).numpy(), rate)
        print(f"wrote {path}: left the model, right the user, {answers.shape[1] / rate:.2f} s")
    if options.report is not None:
        Path(options.report).write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _output_paths(path: Path, batch_size: int) -> list[Path]:
    """One file, or `out-0.wav`, `out-1.wav`, … as Moshi names them."""
    if batch_size == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{row}{path.suffix}") for row in range(batch_size)]


def _write_wav(path: Path, audio: np.ndarray, sample_rate: int) -> None:
    partial = path.with_name(f".{path.stem}.partial.wav")
    try:
        sphn.write_wav(str(partial), audio.clip(-1, 1), sample_rate)
        partial.replace(path)
    except (OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error}.") from None


def _print_summary(report: dict[str, Any]) -> None:
    factor = report["real_time_factor"]
    print(
        f"{report['num_frames']} frames, {report['audio_sec']:.1f} s of audio in "
        f"{report['compute_sec']:.1f} s: real-time factor {factor:.2f} ({1 / factor:.1f}x real time)"
    )
    print(
        f"latency per frame: median {report['latency_median_ms']:.1f} ms, p99 "
        f"{report['latency_p99_ms']:.1f} ms, of {report['frame_ms']:.0f} ms; "
        f"{report['share_within_frame']:.1%} of the frames within"
    )
    if report["memory_resets"]:
        print(f"memory: {report['memory_resets']} resets of fast weights that were no longer finite")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="generate.py",
        description="Play a recording of a user to a trained model and write the conversation.",
        allow_abbrev=False,
    )
    parser.add_argument("input", help="the user's voice: mono, or the right channel of a stereo file")
    parser.add_argument("output", help="stereo wav to write: left the model, right the user")
    add_model_options(parser)
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        default=1,
        help="answers side by side, written as out-0.wav, out-1.wav, … (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    group = parser.add_argument_group("memory")
    group.add_argument("--load-memory", metavar="FILE", help="fast weights to begin with")
    group.add_argument("--save-memory", metavar="FILE", help="write the fast weights at the end")
    group.add_argument(
        "--load-session", metavar="FILE", help="go on from a session, as if it had never stopped"
    )
    group.add_argument("--save-session", metavar="FILE", help="write the whole state at the end")
    parser.add_argument("--report", metavar="FILE", help="write times and texts as JSON")
    options = parser.parse_args(arguments)
    if options.load_session is not None and options.load_memory is not None:
        raise ConfigError("--load-memory: a session holds its memory already; give one of the two.")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed: {options.seed} is not allowed, must be between 0 and 2**63 - 1.")
    if Path(options.output).suffix.lower() != ".wav":
        raise ConfigError(f"{options.output}: the output is a wav file, its name must end with .wav.")
    for path in (options.output, options.save_memory, options.save_session, options.report):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{path}: its folder does not exist.")
        if path is not None and Path(path).is_dir():
            raise ConfigError(f"{path}: is a folder.")
    return options
