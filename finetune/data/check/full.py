"""The check of one recording that reads every sample and every word."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
from moshi.models.loaders import FRAME_RATE

from finetune.data.args import TextOptions
from finetune.data.audio.read import read_audio_header, read_pieces
from finetune.data.batches.interleaver import TextCount, count_text
from finetune.data.check.fast import check_channels, check_fast, compare_duration, find_file
from finetune.data.check.findings import Finding, reason_of, reason_of_audio
from finetune.data.check.sound import check_levels, check_swapped
from finetune.data.check.sound_levels import LevelMeter, Levels
from finetune.data.check.timings import check_placing, check_text, check_words
from finetune.data.codes.mono import MonoPolicy
from finetune.data.recordings.lines import Recording
from finetune.data.words import SPEAKERS, Word, load_alignments
from finetune.errors import DataError
from finetune.files import hash_file

MOSHI_SAMPLE_RATE = 24_000
# Of these, the file is not opened a second time.
_HOPELESS = frozenset({"missing", "not-a-file"})


@dataclass(frozen=True)
class Settings:
    """What a check depends on.

    Attributes:
        mono: what training does with mono files.
        tokenizer: a sentencepiece model; None leaves out what needs it.
        text: what training does with words.
    """

    mono: MonoPolicy = "error"
    tokenizer: Path | None = None
    text: TextOptions = field(default_factory=TextOptions)


@dataclass(frozen=True)
class CheckedRecording:
    """What is known of a recording after its check.

    Attributes:
        findings: what is wrong, at most one of a code.
        duration_sec: decoded length in seconds, None where it cannot be decoded.
        digest: of the audio file's bytes, None where it cannot be read.
        voiced: share of the time in which a voice is heard, per channel.
        words_per_minute: of the left and the right speaker; empty without word timings.
        num_words: by speaker; None where nothing is known of the words.
        text: how much of the text would be trained on; None without a tokenizer.
    """

    findings: list[Finding]
    duration_sec: float | None = None
    digest: str | None = None
    voiced: list[float] = field(default_factory=list)
    words_per_minute: list[float] = field(default_factory=list)
    num_words: Counter[str] | None = None
    text: TextCount | None = None


class Spelling:
    """Tells which texts a sentencepiece model can spell.

    Args:
        path: of the model.

    Raises:
        DataError: it is no sentencepiece model.
    """

    def __init__(self, path: Path) -> None:
        finding = find_file(path)
        if finding is not None:
            raise DataError(f"{path}: not a sentencepiece model ({finding.reason}).")
        try:
            self.model = sentencepiece.SentencePieceProcessor(str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a sentencepiece model ({reason_of(path, error)}).") from None

    def is_known(self, text: str) -> bool:
        """Whether no piece of a text is the unknown one."""
        return self.model.unk_id() not in self.model.encode(text)


class Checker:
    """Checks recordings one after the other.

    Args:
        settings: see there.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tokenizer = None if settings.tokenizer is None else Spelling(settings.tokenizer)

    def check(self, recording: Recording) -> CheckedRecording:
        """Read a recording from its first to its last byte, in bounded memory for wav and flac files.

        Args:
            recording: with a `duration_sec` of NaN where the manifest's is unknown, which is not compared.

        Raises:
            OSError: a file was lost or damaged while it was read.
        """
        fast = check_fast(recording, mono=self._settings.mono, text=self._settings.text)
        found = {finding.code: finding for finding in fast}
        if _HOPELESS & found.keys():
            return CheckedRecording(fast)
        levels, duration_sec, audio = self._check_audio(recording)
        words, timings = self._check_timings(recording, found, duration_sec)
        text = self._count_text(words, duration_sec)
        if text is not None:
            timings += check_placing(recording.alignment_path, text)
        swapped = [] if levels is None else check_swapped(recording.path, levels, words or [])
        # What the header and the samples show alike is said once, as the samples have it.
        found |= {finding.code: finding for finding in (*audio, *swapped, *timings)}
        return CheckedRecording(
            list(found.values()),
            duration_sec,
            hash_file(recording.path),
            [] if levels is None else [float(levels.voiced(i).mean()) for i in range(len(levels.dbfs))],
            _words_per_minute(words or [], duration_sec),
            None if words is None else Counter(word.speaker for word in words),
            text,
        )

    def _check_audio(self, recording: Recording) -> tuple[Levels | None, float | None, list[Finding]]:
        path = recording.path
        try:
            header = read_audio_header(path)
            meter = LevelMeter(header.channels, header.sample_rate)
            for piece in read_pieces(path, sample_rate=header.sample_rate):
                meter.add(piece)
        except DataError as error:
            return None, None, [Finding(error.code or "unreadable", path, reason_of_audio(path, error))]
        findings = check_channels(path, header, mono=self._settings.mono)
        if round(meter.num_samples * MOSHI_SAMPLE_RATE / header.sample_rate) == 0:
            return None, None, [*findings, Finding("empty", path, f"holds {meter.num_samples} samples only")]
        if header.sample_rate != MOSHI_SAMPLE_RATE:
            reason = f"has {header.sample_rate:,} samples per second, not {MOSHI_SAMPLE_RATE:,}"
            findings.append(Finding("resampled", path, reason))
        duration_sec = meter.num_samples / header.sample_rate
        findings += compare_duration(recording, duration_sec)
        levels = meter.finish()
        return levels, duration_sec, findings + check_levels(path, levels)

    def _check_timings(
        self, recording: Recording, found: dict[str, Finding], duration_sec: float | None
    ) -> tuple[list[Word] | None, list[Finding]]:
        path = recording.alignment_path
        if {"no-timings", "malformed-timings"} & found.keys() or self._settings.text.text == "none":
            return None, []
        words = load_alignments(path)
        findings = check_words(path, words, duration_sec=duration_sec)
        if self._tokenizer is not None:
            findings += check_text(path, words, self._tokenizer.is_known)
        return words, findings

    def _count_text(self, words: list[Word] | None, duration_sec: float | None) -> TextCount | None:
        if self._tokenizer is None or words is None or duration_sec is None:
            return None
        return count_text(
            words,
            num_frames=math.ceil(round(duration_sec * FRAME_RATE, 6)),
            frame_rate=FRAME_RATE,
            tokenizer=self._tokenizer.model,
            options=self._settings.text,
        )


def _words_per_minute(words: list[Word], duration_sec: float | None) -> list[float]:
    if not words or duration_sec is None:
        return []
    return [sum(w.speaker == speaker for w in words) * 60 / duration_sec for speaker in SPEAKERS]
