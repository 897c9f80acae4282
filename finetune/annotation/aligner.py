"""Forced alignment: when the words of a known English text are spoken, with PocketSphinx.

The acoustic model that the package brings is for English at 16 kHz.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune.annotation.letter_to_sound import guess_phones
from finetune.annotation.sentence_graph import SentenceGraph
from finetune.annotation.silence import Condensed, loudest, without_long_silences
from finetune.annotation.spoken_form import spoken_parts
from finetune.data.words import Word
from finetune.errors import DataError, UserError

SAMPLE_RATE = 16_000
MIN_SCORE = -2.5
MIN_LOCAL_SCORE = -3.5
LOCAL_WORDS = 8

_FRAME_SEC = 0.01
_PAD_SEC = 0.3
_LEVEL = 0.2  # of the loudest 10 ms; full scale is 1
_NOISE = 4e-3  # standard deviation: digital silence has no features
# Of the two searches: the decoder's own, and wide ones.
_BEAMS: tuple[dict[str, float], ...] = ({}, {"beam": 1e-90, "pbeam": 1e-90, "wbeam": 1e-70})
_SMALLEST = 5e-324


class Alignment(NamedTuple):
    """Words in order, and how well they match: mean acoustic scores per frame of 10 ms, in nats.

    A score is a log-likelihood relative to the best that the search saw in the frame, 0 at most.

    Attributes:
        words: as written.
        score: of all words.
        local_score: of the worst eight words in a row: a few wrong words hardly change the score of a long
            recording.
    """

    words: list[Word]
    score: float
    local_score: float


class Aligner:
    """Aligns texts with recordings; holds the acoustic model, so make one per process.

    Args:
        min_score: the lowest score of a whole recording that is accepted.
        min_local_score: the lowest score of eight words in a row that is accepted.

    Raises:
        UserError: pocketsphinx is not installed.
    """

    def __init__(self, *, min_score: float = MIN_SCORE, min_local_score: float = MIN_LOCAL_SCORE) -> None:
        self.min_score = min_score
        self.min_local_score = min_local_score
        self._decoders = [make_decoder(lm=None, **_BEAMS[0])]

    def align(self, samples: np.ndarray, text: str) -> Alignment:
        """Find the time of every word.

        A search that prunes as usual comes first. Where it loses the text or matches badly, a second one
        prunes less.

        Args:
            samples: [num_samples], float in -1..1 at 16 kHz, one voice.
            text: what is said, all of it and nothing else; words are separated by white space.

        Returns:
            One entry per written word that is spoken: punctuation that stands alone has none.

        Raises:
            DataError: the text is empty or not English, or does not match the recording; one line.
        """
        written = text.split()
        graph = SentenceGraph([spoken_parts(word) for word in written])
        if not graph.arcs:
            raise DataError("the transcript is empty.")
        sound = without_long_silences(samples, sample_rate=SAMPLE_RATE)
        pcm = to_pcm(sound.samples)
        best: Alignment | None = None
        for search in range(len(_BEAMS)):
            found = self._search(search, graph, written, pcm, sound)
            if found is not None and (best is None or found.score > best.score):
                best = found
            if best is not None and self._is_accepted(best):
                return best
        raise DataError(f"the transcript does not match the recording: {self._reason(best)}")

    def _is_accepted(self, found: Alignment) -> bool:
        return found.score >= self.min_score and found.local_score >= self.min_local_score

    def _reason(self, best: Alignment | None) -> str:
        if best is None:
            return "its words cannot be placed one after the other."
        if best.score < self.min_score:
            return f"score {best.score:.2f}, at least {self.min_score:g} is needed."
        return (
            f"score {best.local_score:.2f} for {LOCAL_WORDS} words in a row, at least "
            f"{self.min_local_score:g} is needed."
        )

    def _search(
        self, search: int, graph: SentenceGraph, written: Sequence[str], pcm: bytes, sound: Condensed
    ) -> Alignment | None:
        if search == len(self._decoders):
            self._decoders.append(make_decoder(lm=None, **_BEAMS[search]))
        decoder = self._decoders[search]
        for token in {arc.token for arc in graph.arcs}:
            _make_known(decoder, token)
        arcs = [(arc.source, arc.target, arc.probability, arc.token) for arc in graph.arcs]
        try:
            decoder.add_fsg("text", decoder.create_fsg("text", 0, graph.final, arcs))
            decoder.activate_search("text")
            decoder.start_utt()
            decoder.process_raw(pcm, full_utt=True)
            decoder.end_utt()
        except (KeyError, RuntimeError, ValueError) as error:
            # It may be in the middle of the utterance: the next recording gets a fresh one.
            self._decoders[search] = make_decoder(lm=None, **_BEAMS[search])
            raise DataError(f"pocketsphinx failed ({error}).") from error
        if decoder.hyp() is None:
            return None
        segments = [segment for segment in decoder.seg() if segment.word[0] not in "<[("]
        tokens = [re.sub(r"\(\d+\)$", "", segment.word) for segment in segments]
        indices = graph.words_of(tokens)
        if indices is None:
            return None
        return _alignment(segments, indices, written, sound)


def make_decoder(**settings: Any) -> Any:
    """PocketSphinx's decoder for English at 16 kHz.

    Args:
        settings: its own, where they are not the defaults.

    Raises:
        UserError: pocketsphinx is not installed.
    """
    try:
        from pocketsphinx import Decoder
    except ImportError as error:
        raise UserError("pocketsphinx is not installed: pip install 'moshi-ttt[annotate]'") from error
    return Decoder(samprate=SAMPLE_RATE, loglevel="FATAL", **settings)


def _make_known(decoder: Any, token: str) -> None:
    """Add a pronunciation where the dictionary has none."""
    if decoder.lookup_word(token) is not None:
        return
    stem = token.removesuffix("'s").removesuffix("'")
    known = decoder.lookup_word(stem) if stem != token else None
    phones = known.split() if known else guess_phones(stem)
    if token.endswith("'s"):
        phones = [*phones, "IH Z" if phones[-1] in ("S", "Z", "SH", "ZH", "CH", "JH") else "Z"]
    decoder.add_word(token, " ".join(phones), False)


def to_pcm(samples: np.ndarray) -> bytes:
    """16-bit samples with faint noise under them and at both ends; the same input gives the same bytes."""
    padded = np.pad(samples.astype(np.float64), round(_PAD_SEC * SAMPLE_RATE))
    padded *= _LEVEL / max(loudest(samples, sample_rate=SAMPLE_RATE), 1e-9)
    padded += np.random.default_rng(0).normal(0.0, _NOISE, len(padded))
    return np.round(np.clip(padded, -1.0, 1.0) * 32767).astype("<i2").tobytes()


def _alignment(
    segments: Sequence[Any], indices: Sequence[int], written: Sequence[str], sound: Condensed
) -> Alignment:
    spans: dict[int, list[float]] = {}
    for segment, index in zip(segments, indices, strict=True):
        end_sec = _time(segment.end_frame, sound) + _FRAME_SEC
        spans.setdefault(index, [_time(segment.start_frame, sound), end_sec])[1] = end_sec
    words = [Word(written[index], start_sec, end_sec) for index, (start_sec, end_sec) in spans.items()]
    # A likelihood is 0 where it is too small for a float.
    scores = np.array([math.log(max(segment.ascore, _SMALLEST)) for segment in segments])  # [num_tokens]
    lengths = np.array([segment.end_frame + 1 - segment.start_frame for segment in segments], dtype=float)
    window = np.ones(min(LOCAL_WORDS, len(scores)))
    local = np.convolve(scores, window, "valid") / np.convolve(lengths, window, "valid")
    return Alignment(words, float(scores.sum() / lengths.sum()), float(local.min()))


def _time(frame: int, sound: Condensed) -> float:
    """The second of the recording in which a frame begins."""
    sample = (frame * _FRAME_SEC - _PAD_SEC) * SAMPLE_RATE
    return sound.original(min(max(sample, 0.0), len(sound.samples))) / SAMPLE_RATE
