"""Where an utterance is voiced, by its energy, and word times that are estimated from it."""

import numpy as np

from finetune.data.words import Word
from finetune.errors import DataError

_FRAME_SEC = 0.01
_SMOOTH_FRAMES = 5
_NOISE_SHARE = 0.05  # of the frames are taken for background
_ABOVE_NOISE_DB = 8.0
_BELOW_LOUDEST_DB = (20.0, 40.0)  # the threshold stays between these
_BRIDGED_SEC = 0.1  # a shorter gap is inside a word: the closure of a stop
_MARGIN_SEC = 0.05  # of what is trimmed that stays
_LEAST_POWER = 1e-10
_AUDIBLE_DB = -60.0
# A word takes time by its letters and these. Chosen on English lines that PocketSphinx aligns.
_LETTERS_MORE = 2
_PHRASE_END = 1.3  # before a punctuation mark, words are longer by this factor
_LAST = 1.6  # and at the end
_FASTEST = 20.0  # letters in a second of voice: nobody speaks as fast


def find_voice(samples: np.ndarray, *, sample_rate: int) -> np.ndarray:
    """Where there is voice, in seconds: [num_stretches, 2], in order and apart.

    A frame of 10 ms is voiced if it is 8 dB above the background, the quietest twentieth, but no less than
    40 dB and no more than 20 dB below the loudest.

    Args:
        samples: [num_samples], float in -1..1.
        sample_rate: in Hz.

    Raises:
        DataError: nothing is to be heard; one line.
    """
    frame = round(_FRAME_SEC * sample_rate)
    num_frames = len(samples) // frame
    if not num_frames:
        raise DataError("is too short.")
    framed = samples[: num_frames * frame].reshape(num_frames, frame).astype(np.float64)
    power = np.maximum((framed**2).mean(axis=1), _LEAST_POWER)
    levels = 10 * np.log10(power)
    loudest = float(levels.max())
    if loudest < _AUDIBLE_DB:
        raise DataError("is silent.")
    least, most = _BELOW_LOUDEST_DB
    above_noise = float(np.quantile(levels, _NOISE_SHARE)) + _ABOVE_NOISE_DB
    threshold = min(max(above_noise, loudest - most), loudest - least)
    window = np.ones(min(_SMOOTH_FRAMES, num_frames))
    smooth = 10 * np.log10(np.convolve(power, window / len(window), mode="same"))
    runs = _runs(smooth[:num_frames] > threshold) * frame / sample_rate
    apart = runs[1:, 0] - runs[:-1, 1] >= _BRIDGED_SEC
    starts = runs[np.concatenate(([True], apart)), 0]
    ends = runs[np.concatenate((apart, [True])), 1]
    return np.stack([starts, ends], axis=1)


def trim(samples: np.ndarray, voice: np.ndarray, *, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples from the first voice to the last, with 50 ms around, and the voice's new times."""
    start = max(round((float(voice[0, 0]) - _MARGIN_SEC) * sample_rate), 0)
    end = round((float(voice[-1, 1]) + _MARGIN_SEC) * sample_rate)
    return samples[start:end], voice - start / sample_rate


def estimate_words(text: str, voice: np.ndarray) -> list[Word]:
    """Word times from the text and the voiced stretches alone.

    The words share the voiced time by their number of letters; those at the end of a phrase get more. A word
    whose share begins at a pause begins after it.

    Args:
        text: words separated by white space; punctuation that stands alone gets no time.
        voice: [num_stretches, 2], in seconds.

    Returns:
        The words in order, without overlaps.

    Raises:
        DataError: there is no word, or more of them than anybody says in that time; one line.
    """
    written = [word for word in text.split() if any(char.isalnum() for char in word)]
    if not written:
        raise DataError("has no words.")
    lengths = np.array(
        [_LETTERS_MORE + sum(char.isalnum() for char in word) for word in written], dtype=float
    )
    lengths[:-1] *= [1.0 if word[-1].isalnum() else _PHRASE_END for word in written[:-1]]
    lengths[-1] *= _LAST
    done = np.concatenate(([0.0], np.cumsum(voice[:, 1] - voice[:, 0])))  # voiced time before each stretch
    if sum(char.isalnum() for char in text) > _FASTEST * done[-1]:
        raise DataError("the transcript is too long for the recording.")
    bounds = np.cumsum([0, *lengths]) / lengths.sum() * done[-1]
    return [
        Word(word, _begin(voice, done, start), _end(voice, done, end))
        for word, start, end in zip(written, bounds[:-1], bounds[1:], strict=True)
    ]


def _begin(voice: np.ndarray, done: np.ndarray, voiced_sec: float) -> float:
    """The time at which so much voice has passed, after a pause that lies there."""
    index = min(int(np.searchsorted(done, voiced_sec + 1e-6, side="right")) - 1, len(voice) - 1)
    return float(voice[index, 0] + voiced_sec - done[index])


def _end(voice: np.ndarray, done: np.ndarray, voiced_sec: float) -> float:
    """The same before a pause that lies there."""
    index = max(int(np.searchsorted(done, voiced_sec - 1e-6, side="left")) - 1, 0)
    return float(voice[index, 0] + voiced_sec - done[index])


def _runs(flags: np.ndarray) -> np.ndarray:
    """Begin and end of every run of True, [num_runs, 2]."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return edges.reshape(-1, 2)
