"""The check of a data set with which a run can start: headers and word timings of many recordings."""

import json
import struct
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from finetune.data.check.fast import check_fast
from finetune.data.recordings.lines import Recording

_NUM_RECORDINGS, _QUICK_RECORDINGS = 10_000, 20
_WORDS = {"without words": 0, "100 words": 100, "500 words": 500}
SECONDS, _SAMPLE_RATE = 180, 24_000


def run(settings: Settings) -> dict[str, Any]:
    """`check_fast` of wav files of 3 minutes, of which only the header takes space on the disk."""
    num_recordings = _QUICK_RECORDINGS if settings.quick else _NUM_RECORDINGS
    with tempfile.TemporaryDirectory() as folder:
        candidates = {}
        for name, num_words in _WORDS.items():
            recordings = write_recordings(Path(folder, str(num_words)), num_recordings, num_words)
            candidates[name] = partial(_check_all, recordings)
        times = interleaved(candidates, settings)
    return {
        "recordings": num_recordings,
        "candidates": {name: times[name].record() for name in candidates},
    }


def _check_all(recordings: Sequence[Recording]) -> None:
    for recording in recordings:
        findings = check_fast(recording)
        assert not findings, findings


def write_recordings(folder: Path, num_recordings: int, num_words: int) -> list[Recording]:
    """Wav files of `SECONDS` with word timings, of which only the headers take space on the disk."""
    folder.mkdir()
    num_bytes = SECONDS * _SAMPLE_RATE * 4
    header = b"RIFF" + struct.pack("<I", 36 + num_bytes) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 1, 2, _SAMPLE_RATE, _SAMPLE_RATE * 4, 4, 16)
    header += b"data" + struct.pack("<I", num_bytes)
    step = SECONDS / max(num_words, 1)
    words = [[f"word{i}", [i * step, (i + 0.8) * step], "SPEAKER_MAIN"] for i in range(num_words)]
    timings = json.dumps({"alignments": words})
    recordings = []
    for number in range(num_recordings):
        path = folder / f"{number}.wav"
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + num_bytes)
        path.with_suffix(".json").write_text(timings)
        recordings.append(Recording(path, float(SECONDS), path.with_suffix(".json")))
    return recordings
