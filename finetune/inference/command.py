"""The work of generate.py: a recording of a user in, a conversation out."""

import argparse
import json
import logging
import signal
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import sphn
import torch
from moshi.models.loaders import SAMPLE_RATE
from torch import Tensor

from finetune.base_model.streams import model_streams
from finetune.commands import Parser, StopRequest
from finetune.data.audio.read import read_named
from finetune.data.words import Word, alignment_entries
from finetune.distributed import set_up_logging
from finetune.errors import ConfigError
from finetune.files import write_json
from finetune.inference.conversation import Conversation, Reply
from finetune.inference.options import (
    add_model_options,
    add_sampling_options,
    check_memory_options,
    choose_checkpoint,
    load_from_options,
    positive_integer,
    sampling_from_options,
    seed,
)
from finetune.inference.outputs import check_kind_of_output, check_outputs, output_paths, writing
from finetune.inference.speech_model import SpeechModel
from finetune.inference.terminal import say
from finetune.inference.timing import FrameTimes
from finetune.inference.transcription import Transcriber
from moshi_ttt.memory import load_ttt_states, save_ttt_states
from moshi_ttt.session import load_session, save_session

logger = logging.getLogger(__name__)


def generate(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says, see `python generate.py --help`.

    Raises:
        UserError: an option, a file or the checkpoint cannot be used.
        StateError: a memory or session cannot be used.
    """
    options = _parse(arguments)
    set_up_logging(lines_to_stdout=False)
    channels = torch.from_numpy(read_named(Path(options.input), sample_rate=SAMPLE_RATE))
    speech = load_from_options(options, must_speak=False)
    check_memory_options(options, speech.lm)
    check_kind_of_output(options, speaks=model_streams(speech.lm).speaks)
    say(f"model: {speech.source}")
    conversation = Conversation(
        speech.lm,
        speech.mimi,
        sampling=sampling_from_options(options),
        batch_size=options.batch_size,
        conditions=speech.conditions,
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(conversation)
        except (RuntimeError, MemoryError):
            raise ConfigError(f"--batch-size: {options.batch_size} rows do not fit into memory.") from None
        _begin(conversation, options)
        times = FrameTimes()
        if conversation.speaks:
            user = channels[-1]
            replies = _talk(speech, conversation, user, times)
            texts = _texts(speech, replies, options.batch_size)
            report = _report(speech, conversation, options, times, texts)
            _save_states(conversation, options)
            _write_voices(conversation, options, user, replies)
        else:
            rows = _write_down(Transcriber(speech, conversation), channels[0], times)
            texts = [" ".join(word.text for word in row) for row in rows]
            report = _report(speech, conversation, options, times, texts)
            _save_states(conversation, options)
            _write_words(options, rows)
        if options.report is not None:
            with writing(options.report) as partial:
                partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print_summary(report)


def _begin(conversation: Conversation, options: argparse.Namespace) -> None:
    conversation.warm_up()
    conversation.start(seed=options.seed)
    if options.load_session is not None:
        load_session(conversation.generator, conversation.mimi, options.load_session)
        say(f"session: goes on from {options.load_session}")
    if options.load_memory is not None:
        load_ttt_states(conversation.lm, options.load_memory)
        say(f"memory: starts from {options.load_memory}")


def _talk(speech: SpeechModel, conversation: Conversation, user: Tensor, times: FrameTimes) -> list[Reply]:
    """Play the user's voice `[num_samples]` to the model, the last frame filled up with silence."""
    replies = []
    text = speech.text_decoder()
    frames = user.split(conversation.mimi.frame_size)
    stop = StopRequest()
    with stop.on(signal.SIGINT, signal.SIGTERM):
        for frame in frames:
            frame = torch.nn.functional.pad(frame, (0, conversation.mimi.frame_size - len(frame)))
            with times.frame():
                replies.append(conversation.listen(frame[None]))
            if replies[-1].tokens is not None:
                say(text.add(int(replies[-1].tokens[0, 0])), end="")
            if stop.requested:
                say(f"\ninterrupted after {len(replies)} of {len(frames)} frames; they are written", end="")
                break
    say(text.finish())
    return replies


def _write_down(transcriber: Transcriber, audio: Tensor, times: FrameTimes) -> list[list[Word]]:
    """Let a model hear `[num_samples]` and print what it writes; the words of each row."""

    def hear(frame: Tensor) -> Reply:
        with times.frame():
            return transcriber.conversation.listen(frame)

    stop = StopRequest()
    with stop.on(signal.SIGINT, signal.SIGTERM):
        rows = transcriber.write(
            audio,
            on_word=lambda word: say(f"{word.start_sec:8.2f}  {word.text}"),
            hear=hear,
            stopped=lambda: bool(stop.requested),
        )
    if stop.requested:
        say("interrupted; the words so far are written")
    return rows


def _texts(speech: SpeechModel, replies: Iterable[Reply], batch_size: int) -> list[str]:
    """What the model wrote in each row."""
    tokens = [reply.tokens[:, 0] for reply in replies if reply.tokens is not None]
    rows = torch.stack(tokens, 1).tolist() if tokens else [[]] * batch_size
    return [speech.text_decoder().decode(row) for row in rows]


def _report(
    speech: SpeechModel,
    conversation: Conversation,
    options: argparse.Namespace,
    times: FrameTimes,
    texts: list[str],
) -> dict[str, Any]:
    return {
        "model": speech.source,
        "input": options.input,
        "ttt": options.ttt,
        "device": str(speech.lm.device),
        "dtype": str(speech.lm.dtype).removeprefix("torch."),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "conditions": None if options.load_session is not None else dict(speech.conditions),
        **times.summary(),
        "memory_resets": conversation.check_memory(),
        "text": texts,
    }


def _save_states(conversation: Conversation, options: argparse.Namespace) -> None:
    if options.save_memory is not None:
        save_ttt_states(conversation.lm, options.save_memory)
        say(f"memory: saved as {options.save_memory}")
    if options.save_session is not None:
        save_session(conversation.generator, conversation.mimi, options.save_session)
        say(f"session: saved as {options.save_session}")


def _write_voices(
    conversation: Conversation, options: argparse.Namespace, user: Tensor, replies: Sequence[Reply]
) -> None:
    answers = torch.cat([reply.audio for reply in replies], 1)  # [B, num_samples]
    user = torch.nn.functional.pad(user, (0, max(0, answers.shape[1] - len(user))))[: answers.shape[1]]
    rate = int(conversation.mimi.sample_rate)
    for row, path in enumerate(output_paths(Path(options.output), options.batch_size)):
        _write_wav(path, torch.stack([answers[row], user]).numpy(), rate)
        say(f"wrote {path}: left the model, right the user, {answers.shape[1] / rate:.2f} s")


def _write_words(options: argparse.Namespace, rows: Sequence[Sequence[Word]]) -> None:
    for words, path in zip(rows, output_paths(Path(options.output), options.batch_size), strict=True):
        with writing(path) as partial:
            write_json(partial, {"alignments": alignment_entries(words)})
        say(f"wrote {path}: {len(words)} words with times")


def _write_wav(path: Path, audio: np.ndarray, sample_rate: int) -> None:
    with writing(path) as partial:
        sphn.write_wav(str(partial), audio.clip(-1, 1), sample_rate)


def _print_summary(report: dict[str, Any]) -> None:
    factor = report["real_time_factor"]
    say(
        f"{report['num_frames']} frames, {report['audio_sec']:.1f} s of audio in "
        f"{report['compute_sec']:.1f} s: real-time factor {factor:.2f} ({1 / factor:.1f}x real time)"
    )
    say(
        f"latency per frame: median {report['latency_median_ms']:.1f} ms, p99 "
        f"{report['latency_p99_ms']:.1f} ms, of {report['frame_ms']:.0f} ms; "
        f"{report['share_within_frame']:.1%} of the frames within"
    )
    if report["memory_resets"]:
        say(f"memory: {report['memory_resets']} resets of fast weights that were no longer finite")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="generate.py",
        description="Play a recording of a user to a trained model and write the conversation, or its words.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "input",
        help="the user's voice: mono, or the right channel of a stereo file (speech to text: the left one)",
    )
    parser.add_argument(
        "output",
        help="stereo wav to write: left the model, right the user; of a speech-to-text model a .json of "
        "words with times",
    )
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        default=1,
        help="answers side by side, written as out-0.wav, out-1.wav, … (%(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the draws (%(default)s)")
    group = parser.add_argument_group("memory")
    group.add_argument("--load-memory", metavar="FILE", help="fast weights to begin with")
    group.add_argument("--save-memory", metavar="FILE", help="write the fast weights at the end")
    group.add_argument(
        "--load-session", metavar="FILE", help="go on from a session, as if it had never stopped"
    )
    group.add_argument("--save-session", metavar="FILE", help="write the whole state at the end")
    parser.add_argument("--report", metavar="FILE", help="write times and texts as JSON")
    options = parser.parse_args(arguments)
    choose_checkpoint(options)
    if options.load_session is not None and options.load_memory is not None:
        raise ConfigError("--load-memory: a session holds its memory already; give one of the two.")
    if options.load_session is not None and options.condition:
        raise ConfigError("--condition: a session holds its conditions already; give one of the two.")
    check_outputs(options)
    return options
