"""Dialogues of recorded human speech: `python -m finetune.demo.debian_prompts --out debian_prompts`.

Debian's telephone prompts, aligned and joined: Moshi says some on the left, the user others on the right.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import soxr

from finetune.annotation.aligner import Aligner
from finetune.commands import Parser
from finetune.data.words import Word
from finetune.demo.debian_prompts.prompts import (
    ALIGNED,
    LANGUAGES,
    Packages,
    align_prompt,
    prompt_packages,
    read_prompts,
)
from finetune.demo.speech.dialogues import MAIN, USER, Turn
from finetune.demo.speech.render import write_dialogue
from finetune.demo.speech.word_times import SAMPLE_RATE, Speech
from finetune.distributed import ConsoleHandler
from finetune.errors import DataError, UserError
from finetune.files import new_folder

logger = logging.getLogger(__name__)

_EVAL_SHARE = 10  # every tenth prompt is heard in the held-out dialogues only
_USER_SLOWER = 1.15  # the user is the same voice, slower and deeper by this factor
_GAPS_SEC = (0.2, 1.0)
_MAX_MINUTES = 30.0


class AlignedPrompt(NamedTuple):
    """A prompt that was accepted."""

    text: str
    speech: Speech


def debian_prompts(arguments: Sequence[str] | None = None) -> int:
    """Make the dialogues and print what there is.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the user has to mend something.
    """
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler()])
    options = _parse(arguments)
    out_dir = options.out.absolute()
    if out_dir.exists():
        raise UserError(f"{options.out}: exists; remove it or choose another --out.")
    packages = read_prompts(options.packages, options.language)
    accepted, rejected = align_all(packages, Aligner() if options.language == ALIGNED else None)
    for name, reason in rejected:
        logger.warning("left out %s: %s", name, reason)
    with new_folder(out_dir) as partial_dir:
        (partial_dir / "copyright").write_text(packages.copyright, encoding="utf-8")
        seconds = write_dialogues(partial_dir / "data", accepted, options)
    how = "aligned" if options.language == ALIGNED else "taken, with estimated word times"
    print(f"prompts:    {len(accepted)} of {len(packages.prompts)} {how}")
    for split, total_sec in seconds.items():
        print(f"{split + ':':11} {out_dir / 'data' / split}.jsonl, {total_sec / 60:.1f} minutes")
    print(f"terms:      {LANGUAGES[options.language]}, {out_dir / 'copyright'}")
    return 0


def align_all(
    packages: Packages, aligner: Aligner | None
) -> tuple[list[AlignedPrompt], list[tuple[str, str]]]:
    """Align every prompt; returns those accepted, and name and reason of the others."""
    accepted, rejected = [], []
    for prompt in packages.prompts:
        try:
            accepted.append(AlignedPrompt(prompt.text, align_prompt(prompt, aligner)))
        except DataError as error:
            rejected.append((prompt.name, str(error)))
    return accepted, rejected


def write_dialogues(
    data_dir: Path, accepted: Sequence[AlignedPrompt], options: argparse.Namespace
) -> dict[str, float]:
    """Write recordings, word timings and the manifests `train.jsonl` and `eval.jsonl`.

    Args:
        data_dir: made here.
        accepted: prompts, of which the two sets of dialogues share none.
        options: `num_train`, `num_eval`, `minutes` and `seed`; the same options give the same files.

    Returns:
        The seconds of each set.

    Raises:
        UserError: too few prompts.
    """
    held_out = list(accepted[::_EVAL_SHARE])
    decks = {"train": [spoken for i, spoken in enumerate(accepted) if i % _EVAL_SHARE], "eval": held_out}
    if not all(decks.values()):
        raise UserError(f"only {len(accepted)} prompts could be aligned, too few for two sets of dialogues.")
    seconds: dict[str, float] = {}
    for split, deck in decks.items():
        rng = random.Random(f"{options.seed}/{split}")
        draws = _draw_without_end(deck, rng)
        (data_dir / split).mkdir(parents=True)
        entries = []
        durations = []
        for index in range(getattr(options, f"num_{split}")):
            turns, speeches = _join(draws, rng, duration_sec=60 * options.minutes)
            path = data_dir / split / f"dialogue_{index:03d}.wav"
            duration_sec = write_dialogue(turns, speeches, path)
            entries.append({"path": f"{split}/{path.name}", "duration": duration_sec})
            durations.append(duration_sec)
        (data_dir / f"{split}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        seconds[split] = sum(durations)
    return seconds


def _draw_without_end(deck: Sequence[AlignedPrompt], rng: random.Random) -> Iterator[AlignedPrompt]:
    """All prompts in random order, and again in another."""
    while True:
        yield from rng.sample(deck, len(deck))


def _join(
    draws: Iterator[AlignedPrompt], rng: random.Random, *, duration_sec: float
) -> tuple[list[Turn], list[Speech]]:
    """The user and Moshi in turns, until the dialogue is long enough."""
    turns: list[Turn] = []
    speeches: list[Speech] = []
    spent_sec = 0.0
    while spent_sec < duration_sec:
        speaker = MAIN if len(turns) % 2 else USER
        spoken = next(draws)
        turns.append(Turn(speaker, spoken.text, round(rng.uniform(*_GAPS_SEC), 3)))
        speeches.append(spoken.speech if speaker == MAIN else _slower(spoken.speech))
        spent_sec += turns[-1].gap_sec + len(speeches[-1].samples) / SAMPLE_RATE
    return turns, speeches


def _slower(speech: Speech) -> Speech:
    """The same speech as if played too slowly."""
    samples = soxr.resample(speech.samples, SAMPLE_RATE, SAMPLE_RATE * _USER_SLOWER)
    words = [
        Word(word.text, word.start_sec * _USER_SLOWER, word.end_sec * _USER_SLOWER) for word in speech.words
    ]
    return Speech(samples, words)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m finetune.demo.debian_prompts",
        description="Makes dialogues of recorded human speech from two packages of Debian.",
        epilog=f"First: apt-get download {' '.join(prompt_packages(ALIGNED))}, or those of another language.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--packages", type=Path, default=Path(), help="where the .deb files are (%(default)s)"
    )
    parser.add_argument(
        "--language",
        choices=LANGUAGES,
        default=ALIGNED,
        help="of the prompts; word times are estimated but for en (%(choices)s; %(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="length of each dialogue (%(default)s)")
    parser.add_argument("--num-train", type=int, default=16, help="dialogues to train on (%(default)s)")
    parser.add_argument("--num-eval", type=int, default=4, help="held-out dialogues (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same files (%(default)s)"
    )
    options = parser.parse_args(arguments)
    for name in ("num_train", "num_eval"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least 1.")
    if not 0 < options.minutes <= _MAX_MINUTES:
        raise UserError(f"--minutes is {options.minutes}, it must be above 0 and at most {_MAX_MINUTES:g}.")
    return options
