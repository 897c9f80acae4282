"""The dialogues of all sources in one folder, each of them also with its speakers exchanged."""

import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.data.words import load_alignments
from finetune.demo.fit_codec import fit_codec
from finetune.demo.memory.assets import vocabulary_size
from finetune.demo.model_folder import TOKENIZER_NAME, write_repository
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.tiny_mimi import NUM_BINS, tiny_mimi_config
from finetune.demo.tiny_moshi import make_tiny_moshi, tiny_moshi_config
from finetune.demo.tokenizer import write_tokenizer_of
from finetune.files import read_json_object

WINDOW, NUM_LAYERS = 4, 4
REACH = (WINDOW - 1) * NUM_LAYERS  # frames back that anything travels by attention

_EXCHANGED = {MAIN: USER, USER: MAIN}
_MAX_PIECES = 1000
_CODEC_EVERY = 4  # recordings to fit the codec on
_SENTENCE_WORDS = 12


class Dialogue(NamedTuple):
    """A recording with its words beside it, and its length."""

    path: Path
    duration_sec: float


def read_manifest(path: Path) -> list[Dialogue]:
    """The recordings of a manifest."""
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Dialogue(path.parent / entry["path"], entry["duration"]) for entry in entries]


def write_set(folder: Path, name: str, sources: Mapping[str, Sequence[Dialogue]], *, both: bool) -> None:
    """Write the exchanged dialogues of all sources and the manifest of a set.

    Args:
        folder: to write `<name>/` and `<name>.jsonl` into.
        name: of the set.
        sources: dialogues by the source's name.
        both: whether the dialogues as they are belong to the set, too.
    """
    (folder / name).mkdir(parents=True)
    lines = []
    for source, dialogues in sources.items():
        for dialogue in dialogues:
            exchanged = folder / name / f"{source}_{dialogue.path.name}"
            exchange_speakers(dialogue.path, exchanged)
            paths = [exchanged.relative_to(folder), *([dialogue.path.absolute()] if both else [])]
            lines += [json.dumps({"path": str(path), "duration": dialogue.duration_sec}) for path in paths]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def exchange_speakers(path: Path, out: Path) -> None:
    """Write a stereo recording whose channels have changed places, and its words."""
    with wave.open(str(path), "rb") as file:
        parameters, data = file.getparams(), file.readframes(file.getnframes())
    with wave.open(str(out), "wb") as file:
        file.setparams(parameters)
        file.writeframes(np.frombuffer(data, dtype="<i2").reshape(-1, 2)[:, ::-1].tobytes())
    words = read_json_object(path.with_suffix(".json"))["alignments"]
    content = {"alignments": [[text, times, _EXCHANGED[speaker]] for text, times, speaker in words]}
    out.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")


def write_model(folder: Path, recordings: Sequence[Path], *, seed: int) -> None:
    """Write tokenizer and codec of recordings and a Moshi with random weights: four codebooks a voice."""
    folder.mkdir()
    words = [word.text for path in recordings for word in load_alignments(path.with_suffix(".json"))]
    sentences = (
        " ".join(words[first : first + _SENTENCE_WORDS]) for first in range(0, len(words), _SENTENCE_WORDS)
    )
    write_tokenizer_of(folder / TOKENIZER_NAME, sentences, max_pieces=_MAX_PIECES)
    lm_config = tiny_moshi_config(
        text_card=vocabulary_size(folder / TOKENIZER_NAME),
        card=NUM_BINS,
        n_q=8,
        dep_q=4,
        delays=[0, 0, 1, 1, 1, 0, 1, 1, 1],
        num_layers=NUM_LAYERS,
        context=WINDOW,
        depformer_context=4,
    )
    mimi = fit_codec(recordings[::_CODEC_EVERY], seed=seed)
    write_repository(
        folder,
        lm=make_tiny_moshi(lm_config, seed=seed),
        lm_config=lm_config,
        mimi=mimi,
        mimi_config=tiny_mimi_config(),
    )
