"""Makes items, dialogues to train on, tokenizer, codec and an untrained Moshi, once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune.demo.fit_codec import fit_codec
from finetune.demo.made_folder import make_once
from finetune.demo.memory.assets import memory_moshi_config, vocabulary_size
from finetune.demo.model_folder import TOKENIZER_NAME, write_repository
from finetune.demo.recall.dialogues import Kind, make_dialogue, make_sentences
from finetune.demo.recall.items import write_items
from finetune.demo.recall.speech import speak_lines
from finetune.demo.speech.lines import Line, num_frames, write_lines
from finetune.demo.speech.word_times import Speech
from finetune.demo.tiny_mimi import tiny_mimi_config
from finetune.demo.tiny_moshi import make_tiny_moshi
from finetune.demo.tokenizer import write_tokenizer_of

MIN_DIALOGUES, MAX_DIALOGUES = 2, 100_000
MIN_ITEMS, MAX_ITEMS = 8, 10_000  # kinds have 11,880 plants each, of which a third is for measuring

_FORMAT = 1  # raise it when the same settings make other files
_NUM_SENTENCES = 4000  # of the tokenizer
_MAX_PIECES = 400
_NUM_CODEC_RECORDINGS = 60  # to fit the codec on: all lines are in them


class RecallAssets(NamedTuple):
    """Where the files are.

    Attributes:
        folder: everything is below it.
        reused: true if the files existed before.
        hours: of the dialogues, by manifest.
    """

    folder: Path
    reused: bool
    hours: Mapping[str, float]

    @property
    def model_dir(self) -> Path:
        """The model repository: configurations, random weights and tokenizer."""
        return self.folder / "model"

    @property
    def items_dir(self) -> Path:
        """For `evaluate.py recall`."""
        return self.folder / "items"

    def manifest(self, name: str) -> Path:
        """Of `echo_train`, `short_train`, `recall_train` or `recall_eval`."""
        return self.folder / "data" / f"{name}.jsonl"


def make_recall_assets(folder: Path, *, num_items: int, num_train: int, seed: int) -> RecallAssets:
    """Make the files, or find them complete and made with the same arguments, see `make_once`.

    Args:
        folder: the directory to make.
        num_items: to measure with, rounded up to whole groups of four.
        num_train: dialogues to train on with plants that are needed later, and as many short ones with one
            plant; half as many in which words are repeated at once, and a tenth as many of the first kind for
            evaluation.
        seed: the same arguments give the same files.

    Raises:
        UserError: `folder` holds something else, or espeak-ng is missing.
    """
    settings = {
        "kind": "recall",
        "format": _FORMAT,
        "num_items": num_items,
        "num_train": num_train,
        "seed": seed,
    }
    made = make_once(folder.absolute(), settings, _build)
    return RecallAssets(folder, made.reused, made.report["hours"])


def _build(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Make all files below `folder` and return the report."""
    seed, data_dir, model_dir = settings["seed"], folder / "data", folder / "model"
    lines, num_train = speak_lines(), settings["num_train"]
    sets: dict[str, tuple[Kind, int]] = {
        "echo_train": ("echo", max(MIN_DIALOGUES, num_train // 2)),
        "short_train": ("short", num_train),
        "recall_train": ("recall", num_train),
        "recall_eval": ("recall", max(MIN_DIALOGUES, num_train // 10)),
    }
    hours = {name: _write_set(data_dir, name, *each, lines, seed=seed) for name, each in sets.items()}
    write_items(folder / "items", lines, num_items=settings["num_items"], seed=seed)
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
    """Write dialogues and their manifest; returns the hours."""
    (data_dir / name).mkdir(parents=True)
    lengths = {line: num_frames(speech) for line, speech in lines.items()}
    entries, total_sec = [], 0.0
    for index in range(count):
        turns = make_dialogue(kind, f"{seed}/{name}/{index}", lengths)
        path = f"{name}/dialogue_{index:05d}.wav"
        duration_sec = write_lines(turns, lines, data_dir / path)
        entries.append(json.dumps({"path": path, "duration": duration_sec}))
        total_sec += duration_sec
    (data_dir / f"{name}.jsonl").write_text("\n".join(entries) + "\n")
    return total_sec / 3600
