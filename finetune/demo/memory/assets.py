"""Makes recordings, tokenizer, codec and an untrained Moshi of the demonstration, once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from finetune.demo.fit_codec import fit_codec
from finetune.demo.made_folder import make_once
from finetune.demo.memory.dialogues import (
    NUM_LAYERS,
    WINDOW,
    Dialogue,
    Kind,
    make_dialogue,
    make_sentences,
)
from finetune.demo.memory.speech import speak_lines
from finetune.demo.model_folder import TOKENIZER_NAME, write_repository
from finetune.demo.speech.lines import Line, num_frames, write_lines
from finetune.demo.speech.word_times import Speech
from finetune.demo.tiny_mimi import NUM_BINS, tiny_mimi_config
from finetune.demo.tiny_moshi import make_tiny_moshi, tiny_moshi_config
from finetune.demo.tokenizer import write_tokenizer_of
from finetune.errors import DataError
from finetune.files import read_json_object

MIN_DIALOGUES, MAX_DIALOGUES = 2, 10_000  # of a set

_FORMAT = 1  # raise it when the same settings make other files
_NUM_SENTENCES = 4000  # of the tokenizer
_MAX_PIECES = 400
_NUM_CODEC_RECORDINGS = 60  # to fit the codec on: all lines are in them


class Hearings(NamedTuple):
    """The frames in which the words of a dialogue's codes start, the first and the second time, `[words]`."""

    first: list[int]
    second: list[int]


class MemoryAssets(NamedTuple):
    """Where the files are.

    Attributes:
        folder: everything is below it.
        reused: true if the files existed before.
    """

    folder: Path
    reused: bool

    @property
    def model_dir(self) -> Path:
        """The model repository: configurations, random weights and tokenizer."""
        return self.folder / "model"

    def manifest(self, name: str) -> Path:
        """Of `echo_train`, `recall_train` or `recall_eval`."""
        return self.folder / "data" / f"{name}.jsonl"

    def hearings(self, name: str) -> dict[str, Hearings]:
        """Where the codes are said in the dialogues of a manifest, by the name that it gives the dialogue.

        Raises:
            DataError: the file that says so cannot be read.
        """
        found = read_json_object(_hearings_path(self.manifest(name)), error=DataError)
        return {path: Hearings(**frames) for path, frames in found.items()}


def make_memory_assets(folder: Path, *, num_train: int, num_eval: int, seed: int) -> MemoryAssets:
    """Make the files, or find them complete and made with the same arguments, see `make_once`.

    Args:
        folder: the directory to make.
        num_train: dialogues to train on with a code that comes back late, at least `MIN_DIALOGUES`; half as
            many have codes that come back at once.
        num_eval: held-out dialogues of the first kind, at least `MIN_DIALOGUES`.
        seed: the same arguments give the same files.

    Raises:
        UserError: `folder` holds something else, or espeak-ng is missing.
    """
    settings = {
        "kind": "memory",
        "format": _FORMAT,
        "num_train": num_train,
        "num_eval": num_eval,
        "seed": seed,
    }
    made = make_once(folder.absolute(), settings, _build)
    return MemoryAssets(folder, made.reused)


def memory_moshi_config(text_card: int) -> dict[str, Any]:
    """The arguments of `LMModel`: two codebooks of each voice, an attention window of eight frames."""
    return tiny_moshi_config(
        text_card=text_card,
        card=NUM_BINS,
        n_q=4,
        dep_q=2,
        delays=[0, 0, 1, 0, 1],
        dim=64,
        num_layers=NUM_LAYERS,
        context=WINDOW,
        depformer_dim=32,
        depformer_dim_feedforward=132,
        depformer_num_heads=2,
        depformer_num_layers=1,
        depformer_context=2,
    )


def _build(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Make all files below `folder` and return the report."""
    seed, data_dir, model_dir = settings["seed"], folder / "data", folder / "model"
    lines = speak_lines()
    sets: dict[str, tuple[Kind, int]] = {
        "echo_train": ("echo", max(MIN_DIALOGUES, settings["num_train"] // 2)),
        "recall_train": ("recall", settings["num_train"]),
        "recall_eval": ("recall", settings["num_eval"]),
    }
    hours = {name: _write_set(data_dir, name, *each, lines, seed=seed) for name, each in sets.items()}
    model_dir.mkdir()
    tokenizer_path = model_dir / TOKENIZER_NAME
    sentences = make_sentences(f"{seed}/tokenizer", count=_NUM_SENTENCES)
    write_tokenizer_of(tokenizer_path, sentences, max_pieces=_MAX_PIECES)
    recordings = sorted((data_dir / "recall_train").glob("*.wav"))[:_NUM_CODEC_RECORDINGS]
    mimi = fit_codec(recordings, seed=seed)
    lm_config = memory_moshi_config(vocabulary_size(tokenizer_path))
    lm = make_tiny_moshi(lm_config, seed=seed)
    write_repository(model_dir, lm=lm, lm_config=lm_config, mimi=mimi, mimi_config=tiny_mimi_config())
    return {"hours": hours}


def _write_set(
    data_dir: Path, name: str, kind: Kind, count: int, lines: Mapping[Line, Speech], *, seed: int
) -> float:
    """Write dialogues, their manifest and where their codes are said; returns the hours."""
    (data_dir / name).mkdir(parents=True)
    lengths = {line: num_frames(speech) for line, speech in lines.items()}
    entries, hearings, total_sec = [], {}, 0.0
    for index in range(count):
        dialogue: Dialogue = make_dialogue(kind, f"{seed}/{name}/{index}", lengths)
        path = f"{name}/dialogue_{index:04d}.wav"
        duration_sec = write_lines(dialogue.turns, lines, data_dir / path)
        entries.append({"path": path, "duration": duration_sec})
        total_sec += duration_sec
        hearings[path] = Hearings(list(dialogue.first), list(dialogue.second))._asdict()
    manifest = data_dir / f"{name}.jsonl"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    _hearings_path(manifest).write_text(json.dumps(hearings) + "\n")
    return total_sec / 3600


def _hearings_path(manifest: Path) -> Path:
    return manifest.with_suffix(".hearings.json")


def vocabulary_size(tokenizer_path: Path) -> int:
    """Pieces of a tokenizer."""
    return int(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path)).vocab_size())
