"""Renders dialogues to stereo recordings with word timings, in processes of their own.

Run as `python -m finetune.demo.speech.render`, it reads jobs as JSON from standard input. A fresh process
makes espeak-ng reproducible (see `Espeak`), and lets several cores work.
"""

import json
import os
import random
import subprocess
import sys
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.words import Word
from finetune.demo.speech.dialogues import MAIN, USER, Turn
from finetune.demo.speech.espeak import Espeak, EspeakVoice
from finetune.demo.speech.word_times import SAMPLE_RATE, Speech, speak
from finetune.errors import UserError

_MAIN_VOICE = EspeakVoice("en-us", words_per_minute=170, pitch=42)
# Without breath (as the variants f2 and f3 have it): its noise differs from process to process.
_USER_VOICES = ("en-gb-x-rp+f1", "en-gb-scotland+m3", "en-gb-x-rp+f4", "en-gb-x-gbclan", "en-us+f4")
_CHANNELS = (MAIN, USER)  # left, right
_TAIL_SEC = 0.5
_MIN_PAUSE_SEC = 0.1  # between two turns of the same speaker
_NUM_PROCESSES = 2  # not the number of cores: how jobs are shared out decides the audio


@dataclass(frozen=True)
class Job:
    """One dialogue to render.

    Attributes:
        turns: the dialogue, in order.
        user_voice: the user's voice; the main speaker always has the same one.
        wav_path: where to write; the word timings go beside it with the suffix `.json`.
    """

    turns: Sequence[Turn]
    user_voice: EspeakVoice
    wav_path: Path


def draw_user_voice(seed: str) -> EspeakVoice:
    """Pick a voice for the user; the same seed gives the same voice."""
    rng = random.Random(seed)
    return EspeakVoice(
        rng.choice(_USER_VOICES), words_per_minute=rng.randint(160, 190), pitch=rng.randint(45, 70)
    )


def render_all(jobs: Sequence[Job]) -> list[float]:
    """Render dialogues in parallel and return their durations in seconds, in order.

    Raises:
        UserError: a recording cannot be made.
    """
    shares = [jobs[first::_NUM_PROCESSES] for first in range(min(_NUM_PROCESSES, len(jobs)))]
    with ThreadPoolExecutor(_NUM_PROCESSES) as pool:
        durations_sec = list(pool.map(_render_in_new_process, shares))
    return [durations_sec[index % len(shares)][index // len(shares)] for index in range(len(jobs))]


def render(espeak: Espeak, job: Job) -> float:
    """Speaks, mixes and writes one dialogue, and returns its duration in seconds."""
    voices = {MAIN: _MAIN_VOICE, USER: job.user_voice}
    speeches = [speak(espeak, turn.text, voices[turn.speaker]) for turn in job.turns]
    return write_dialogue(job.turns, speeches, job.wav_path)


def write_dialogue(turns: Sequence[Turn], speeches: Sequence[Speech], wav_path: Path) -> float:
    """Mix and write what was spoken, and return its duration in seconds.

    Writes 24 kHz 16-bit stereo, the main speaker on the left, and beside it
    `{"alignments": [[word, [start_sec, end_sec], speaker], ...]}` sorted by start.

    Args:
        turns: the dialogue, in order.
        speeches: one per turn.
        wav_path: where to write; the word timings go beside it with the suffix `.json`.
    """
    starts = place_turns(turns, [len(speech.samples) for speech in speeches])
    stereo, alignments = _mix(turns, speeches, starts)
    with wave.open(str(wav_path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(stereo.astype("<i2").tobytes())
    wav_path.with_suffix(".json").write_text(json.dumps({"alignments": alignments}))
    return len(stereo) / SAMPLE_RATE


def place_turns(turns: Sequence[Turn], num_samples: Sequence[int]) -> list[int]:
    """The first sample of every turn.

    A turn starts `gap_sec` after the end of all earlier speech, but never while its speaker still talks.
    """
    starts: list[int] = []
    ends = dict.fromkeys(_CHANNELS, 0)
    for turn, length in zip(turns, num_samples, strict=True):
        start = max(ends.values()) + round(turn.gap_sec * SAMPLE_RATE)
        own_end = ends[turn.speaker]
        start = max(start, own_end + round(_MIN_PAUSE_SEC * SAMPLE_RATE) if own_end else 0)
        starts.append(start)
        ends[turn.speaker] = start + length
    return starts


def _mix(
    turns: Sequence[Turn], speeches: Sequence[Speech], starts: Sequence[int]
) -> tuple[np.ndarray, list[list]]:
    """Int16 samples [num_samples, 2] and the alignments."""
    spoken = list(zip(turns, speeches, starts, strict=True))
    total = max(start + len(speech.samples) for _, speech, start in spoken) + round(_TAIL_SEC * SAMPLE_RATE)
    stereo = np.zeros((total, len(_CHANNELS)), dtype=np.float32)
    alignments = []
    for turn, speech, start in spoken:
        stereo[start : start + len(speech.samples), _CHANNELS.index(turn.speaker)] = speech.samples
        alignments += [_alignment(word, start / SAMPLE_RATE, turn.speaker) for word in speech.words]
    alignments.sort(key=lambda entry: entry[1][0])
    return np.clip(np.round(stereo * 32767), -32768, 32767), alignments


def _alignment(word: Word, offset_sec: float, speaker: str) -> list:
    return [word.text, [round(offset_sec + word.start_sec, 3), round(offset_sec + word.end_sec, 3)], speaker]


def _render_in_new_process(jobs: Sequence[Job]) -> list[float]:
    project_root = str(Path(__file__).parents[3])
    search_path = os.pathsep.join(filter(None, (project_root, os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-m", "finetune.demo.speech.render"],
        input=json.dumps([asdict(job) | {"wav_path": str(job.wav_path)} for job in jobs]),
        env=os.environ | {"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise UserError(f"the dialogues cannot be synthesised: {lines[-1]}")
    return json.loads(result.stdout)


def _read_job(data: dict[str, Any]) -> Job:
    turns = [Turn(**turn) for turn in data["turns"]]
    return Job(turns, EspeakVoice(**data["user_voice"]), Path(data["wav_path"]))


if __name__ == "__main__":
    synthesiser = Espeak()
    print(json.dumps([render(synthesiser, _read_job(data)) for data in json.load(sys.stdin)]))
