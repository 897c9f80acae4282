"""Items for `evaluate.py recall` out of held-out dialogues: whose voice Moshi has, and what was said.

Of the kind `voice` Moshi says one thing in the voice of one of two speakers, and the answer that goes on in
the same voice is right. Of the kind `words` somebody says one of four things, and Moshi repeats it, the very
recording.
"""

import itertools
import json
import random
import re
import wave
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.human_speech.recordings import Dialogue
from finetune.data.words import Word, load_alignments
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.speech.word_times import SAMPLE_RATE
from finetune.evaluation.recall.items import FILLER_DIR, ITEMS_FILE

_FILLET_VOICES = {MAIN: "small", USER: "big"}
_LENGTHS_SEC = (1.0, 3.0)  # of what is said once or needed later
_FILLER_SEC = (3.0, 20.0)  # longer, so that no filler is a plant
_ENDS_SEC = 0.08  # of silence around a turn
_PAUSE_SEC = 0.6  # after which a turn is over
_NUM_WORDS_ANSWERS = 4


class Turn(NamedTuple):
    """What a speaker says without a longer pause, and nobody else at the same time.

    Attributes:
        source: of the dialogue.
        voice: the speaker.
        path: the recording.
        channel: 0 left, 1 right.
        words: of the turn, seconds of the recording.
    """

    source: str
    voice: str
    path: Path
    channel: int
    words: tuple[Word, ...]

    @property
    def seconds(self) -> float:
        """Its length, without silence around it."""
        return self.words[-1].end_sec - self.words[0].start_sec


def write_human_items(
    folder: Path, sources: Mapping[str, Sequence[Dialogue]], *, groups_per_kind: int, seed: int
) -> None:
    """Write a folder of items.

    Args:
        folder: to make.
        sources: dialogues by the source's name, not exchanged.
        groups_per_kind: of each source; of `words` half are said by Moshi.
        seed: the same arguments give the same items.
    """
    rng = random.Random(f"{seed}/human items")
    writer = _Writer(folder)
    entries: list[dict[str, object]] = []
    for source, dialogues in sources.items():
        turns = [turn for dialogue in dialogues for turn in find_turns(source, dialogue.path)]
        talk = [turn for turn in turns if _FILLER_SEC[0] < turn.seconds <= _FILLER_SEC[1]]
        filler = [writer.write(turn, USER, FILLER_DIR) for turn in talk]
        by_voice = _by_voice(turns)
        for number in range(groups_per_kind):
            for kind in ("voice", "words"):
                said_by = "moshi" if kind == "voice" or number % 2 else "user"
                plants, answers = (_voices if kind == "voice" else _words)(rng, by_voice)
                speaker = MAIN if said_by == "moshi" else USER
                cue = rng.choice(
                    [turn for turn in itertools.chain(*by_voice.values()) if turn not in plants + answers]
                )
                entries.append(
                    {
                        "id": f"{source}-{kind}-{number:03d}",
                        "kind": f"{kind}, {source}",
                        "said_by": said_by,
                        "plants": [writer.write(turn, speaker) for turn in plants],
                        "cue": writer.write(cue, USER),
                        "answers": [writer.write(turn, MAIN) for turn in answers],
                        "filler": filler,
                    }
                )
    (folder / ITEMS_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def find_turns(source: str, path: Path) -> list[Turn]:
    """The turns of a dialogue.

    Args:
        source: of `finetune.demo.human_dialogues`.
        path: the recording.
    """
    turns: list[list[Word]] = []
    for word in load_alignments(path.with_suffix(".json")):
        last = turns[-1][-1] if turns else None
        if last and last.speaker == word.speaker and word.start_sec - last.end_sec < _PAUSE_SEC:
            turns[-1].append(word)
        else:
            turns.append([word])
    speakers = [words[0].speaker for words in turns]
    return [
        Turn(source, _voice(source, path, speaker), path, (MAIN, USER).index(speaker), tuple(words))
        for words, speaker in zip(turns, speakers, strict=True)
    ]


def _voice(source: str, path: Path, speaker: str) -> str:
    """Who speaks; empty where that is not known: in scenes without a player Joe's partner has no name."""
    if source.startswith("fillets"):
        return _FILLET_VOICES[speaker]
    if speaker == MAIN:
        return "joe"
    named = re.fullmatch(r"dog_([a-z]+)\d*", path.stem)
    return named[1] if named else ""


def _by_voice(turns: Sequence[Turn]) -> dict[str, list[Turn]]:
    """Turns of a fitting length, of the voices that have enough of them."""
    by_voice: dict[str, list[Turn]] = defaultdict(list)
    for turn in turns:
        if turn.voice and _LENGTHS_SEC[0] <= turn.seconds <= _LENGTHS_SEC[1]:
            by_voice[turn.voice].append(turn)
    return {voice: own for voice, own in by_voice.items() if len(own) >= _NUM_WORDS_ANSWERS}


def _voices(rng: random.Random, by_voice: Mapping[str, Sequence[Turn]]) -> tuple[list[Turn], list[Turn]]:
    """Two voices, each once as a plant and with another turn as an answer."""
    pairs = [rng.sample(by_voice[voice], 2) for voice in rng.sample(sorted(by_voice), 2)]
    plants, answers = zip(*pairs, strict=True)
    return list(plants), list(answers)


def _words(rng: random.Random, by_voice: Mapping[str, Sequence[Turn]]) -> tuple[list[Turn], list[Turn]]:
    """Turns of one voice, which come again."""
    said = rng.sample(by_voice[rng.choice(sorted(by_voice))], _NUM_WORDS_ANSWERS)
    return said, said


class _Writer:
    """Recordings of a folder, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, turn: Turn, speaker: str, place: str = "said") -> str:
        """A turn on a speaker's channel, silence on the other; returns its path in the folder."""
        start_sec = max(0.0, turn.words[0].start_sec - _ENDS_SEC)
        side = "moshi" if speaker == MAIN else "user"
        name = f"{place}/{turn.source}_{turn.path.stem}_{start_sec:.2f}.{side}.wav"
        path = self._folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut(turn, start_sec, (MAIN, USER).index(speaker), path)
            words = [
                [word.text, [word.start_sec - start_sec, word.end_sec - start_sec], speaker]
                for word in turn.words
            ]
            path.with_suffix(".json").write_text(json.dumps({"alignments": words}), encoding="utf-8")
        return name


def _cut(turn: Turn, start_sec: float, channel: int, path: Path) -> None:
    first, stop = (round(at * SAMPLE_RATE) for at in (start_sec, turn.words[-1].end_sec + _ENDS_SEC))
    with wave.open(str(turn.path), "rb") as file:
        file.setpos(first)
        data = file.readframes(min(stop, file.getnframes()) - first)
        parameters = file.getparams()
    heard = np.frombuffer(data, dtype="<i2").reshape(-1, 2)[:, turn.channel]
    stereo = np.zeros((len(heard), 2), dtype="<i2")
    stereo[:, channel] = heard
    with wave.open(str(path), "wb") as file:
        file.setparams(parameters)
        file.writeframes(stereo.tobytes())
