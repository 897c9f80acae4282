"""How many words a data set has, and how much of its text is trained on."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable

from finetune.data.args import TextOptions
from finetune.data.batches.dataset import ChunkDataset
from finetune.data.batches.interleaver import TextCount
from finetune.data.words import SPEAKERS
from finetune.distributed import alike, gather_objects, get_rank, get_world_size
from finetune.errors import DataError

logger = logging.getLogger(__name__)
_MAX_NAMES = 3


def refuse_wordless(num_words: Iterable[Counter[str]], options: TextOptions, *, key: str) -> None:
    """Raise DataError where text is to be trained and no recording has a word of it.

    Args:
        num_words: of each recording, by speaker.
        options: of the text stream.
        key: configuration key of the recordings, for messages.
    """
    recordings = list(num_words)
    total = sum(recordings, Counter())
    if options.text == "none" or not recordings or _num_text(total, options):
        return
    if not total:
        raise DataError(
            f"{key}: no words at all in {_plural(len(recordings), 'recording')}, so the text stream would be "
            "empty; annotate them (python annotate.py), or set data.text: none to train on the audio alone."
        )
    raise DataError(
        f"{key}: none of {_plural(total.total(), 'word')} is of Moshi ({SPEAKERS[0]}), they are of "
        f"{_names(total)}, so the text stream would be empty; rename the speaker, set data.keep_main_only: "
        "false to take the words of all speakers, or data.text: none to train on the audio alone."
    )


def report_text(
    data: ChunkDataset, num_words: Collection[Counter[str]], *, key: str, name: str
) -> TextCount | None:
    """Log the words of a data set and the share of their tokens that is trained on; each process counts some.

    Args:
        data: the chunks.
        num_words: of each recording, by speaker.
        key: configuration key of the recordings, for messages.
        name: of the data set, which begins the line.

    Returns:
        What was counted, in all processes; None where no text is trained.

    Raises:
        DataError: word timings cannot be read, or no word becomes text.
    """
    options = data.text_options
    if options.text == "none":
        logger.info("%s: no text (data.text: none); the text stream is padding and has no loss.", name)
        return None
    refuse_wordless(num_words, options, key=key)
    with alike():
        mine = range(get_rank(), len(data.recordings), get_world_size())
        part = sum(map(data.count_text, mine), TextCount())
    count = sum(gather_objects(part), TextCount())
    total = sum(num_words, Counter())
    logger.info("%s: %s", name, text_line(count, total, options, frame_rate=data.frame_rate))
    if not count.placed:
        raise DataError(
            f"{key}: none of {_plural(count.words, 'word')} reaches the text stream: they have no text, the "
            "tokenizer does not know it, or they lie behind the end of the audio; correct them, or set "
            "data.text: none to train on the audio alone."
        )
    return count


def text_line(count: TextCount, num_words: Counter[str], options: TextOptions, *, frame_rate: float) -> str:
    """What is said of a data set's text in one line.

    Args:
        count: of its words that become text.
        num_words: of all speakers.
        options: of the text stream.
        frame_rate: frames per second.
    """
    others = Counter({name: n for name, n in num_words.items() if name not in SPEAKERS})
    if options.keep_main_only:
        words = f"{_plural(count.words, 'word')} of Moshi, {num_words[SPEAKERS[1]]:,} of the user"
        if others:
            words += f", {others.total():,} of unknown speakers ({_names(others)}), which are left out"
    else:
        words = f"{_plural(count.words, 'word')} of all speakers"
    text = f"{words}; {share_text(count)}"
    if options.keep_and_shift:
        return f"{text}, at most {count.late_frames / frame_rate:.1f} s late."
    lost = count.tokens - count.placed
    hint = "; data.keep_and_shift: true lets the next word wait instead of cutting" if lost else ""
    return f"{text}{hint}."


def share_text(count: TextCount) -> str:
    """Which share of the text tokens is in the text stream, never rounded up to all of them."""
    if not count.tokens:
        return "no text tokens"
    percent = 100 * count.placed / count.tokens
    shown = "100" if count.placed == count.tokens else f"{min(percent, 99.9):.1f}"
    return f"{shown} % of {count.tokens:,} text tokens are in the text stream"


def _num_text(total: Counter[str], options: TextOptions) -> int:
    return total[SPEAKERS[0]] if options.keep_main_only else total.total()


def _names(speakers: Counter[str]) -> str:
    names = sorted(speakers)
    return ", ".join(repr(name[:40]) for name in names[:_MAX_NAMES]) + (
        " and others" if len(names) > _MAX_NAMES else ""
    )


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
