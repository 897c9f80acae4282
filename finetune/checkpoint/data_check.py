"""Whether a run that is resumed has the recordings that it had."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError

_DIGEST_LENGTH = 8  # characters of each recording's in `resume.json`
_CHANGED = {"words": "the word timings", "audio": "the audio, or the codec,"}
_START_ANEW = "start a new run with init_from"


def shorten(digests: Sequence[str]) -> str:
    """Digests of all recordings for `resume.json`, some characters of each, one after the other."""
    return "".join(digest[:_DIGEST_LENGTH] for digest in digests)


def check_data(
    before: Mapping[str, Any], now: Mapping[str, Any], *, recordings: Sequence[Path], written: Path
) -> list[str]:
    """Compare facts about the training data, as `resume.json` has them, with those of a checkpoint.

    Args:
        before: of the checkpoint; those of earlier versions have fewer.
        now: of the configuration.
        recordings: the audio files now, in their order.
        written: the checkpoint, for messages.

    Returns:
        A line where codes are not quite the same.

    Raises:
        ConfigError: the recordings are others, or in another order.
    """
    if all(now[name] == value for name, value in before.items() if name != "codes"):
        num_others = len(_places(before, now, "codes"))
        if not num_others:
            return []
        return [f"The codes of {num_others} recordings are others than before, made of the same audio."]
    if before["num_recordings"] == now["num_recordings"]:
        old, new = _recordings(before), _recordings(now)
        if old != new and sorted(old) == sorted(new):
            raise ConfigError(
                f"data.train_data: lists the same recordings in another order than when {written} was "
                f"written; restore the order, or {_START_ANEW}."
            )
        for name, what in _CHANGED.items():
            places = _places(before, now, name)
            if places and before["names"] == now["names"]:
                others = f" and of {len(places) - 1} others" if len(places) > 1 else ""
                raise ConfigError(
                    f"data.train_data: {what} of {recordings[places[0]]}{others} changed since {written} was "
                    f"written; restore what was there, or {_START_ANEW}."
                )
    count = f"{now['num_recordings']} instead of {before['num_recordings']}, or of "
    if before["num_recordings"] == now["num_recordings"]:
        count = "as many, of "
    raise ConfigError(
        f"data.train_data: holds other recordings than when {written} was written ({count}other names, "
        f"lengths or shares, or in another order); {_START_ANEW}."
    )


def check_eval_data(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, *, written: Path
) -> list[str]:
    """A line where the evaluation data are others; training does not depend on them.

    Args:
        before, now: facts about them, as in `check_data`; None where there are none, or none were kept.
        written: the checkpoint.
    """
    if before is None or now is None or before == now:
        return []
    return [
        f"data.eval_data: holds other recordings than when {written} was written, or others in them; the "
        "losses of the evaluations before and after do not compare."
    ]


def _split(facts: Mapping[str, Any], name: str) -> list[str]:
    text = facts.get(name, "")
    return [text[start : start + _DIGEST_LENGTH] for start in range(0, len(text), _DIGEST_LENGTH)]


def _recordings(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What tells each recording from others; empty where the facts do not say."""
    return list(zip(*(_split(facts, name) for name in _CHANGED), strict=False))


def _places(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> list[int]:
    """The recordings that differ."""
    pairs = zip(_split(before, name), _split(now, name), strict=False)
    return [place for place, (old, new) in enumerate(pairs) if old != new]
