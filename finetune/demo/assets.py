"""Makes recordings, tokenizer and models of the demo, once."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.demo.codebooks import demand_even_use
from finetune.demo.fit_codec import fit_codec, measure_codec
from finetune.demo.made_folder import MadeFolder, check_seed, find_made, make_once
from finetune.demo.model_folder import TOKENIZER_NAME, open_repository, write_repository
from finetune.demo.speech.dialogues import make_dialogue
from finetune.demo.speech.espeak import find_espeak
from finetune.demo.speech.render import Job, draw_user_voice, render_all
from finetune.demo.tiny_mimi import NUM_BINS, tiny_mimi_config
from finetune.demo.tiny_moshi import make_tiny_moshi, tiny_moshi_config
from finetune.demo.tokenizer import VOCAB_SIZE, write_tokenizer
from finetune.errors import UserError

_FORMAT = 2  # raise it when the same settings make other files
_MAX_MINUTES = 30.0


@dataclass(frozen=True)
class DemoAssets:
    """Where the demo's files are, and what they are like.

    Attributes:
        out_dir: everything is below it.
        settings: the arguments that the files were made with.
        report: `seconds` per part, `audio_hours`, `vocabulary`, `max_entropy_bits` and `codebooks`, a list
            of the used entries and the entropy in bits on speech.
        reused: true if the files existed before.
    """

    out_dir: Path
    settings: dict[str, Any]
    report: dict[str, Any] = field(repr=False)
    reused: bool

    @property
    def train_jsonl(self) -> Path:
        """The manifest of the dialogues to train on."""
        return self.out_dir / "data" / "train.jsonl"

    @property
    def eval_jsonl(self) -> Path:
        """The manifest of the held-out dialogues."""
        return self.out_dir / "data" / "eval.jsonl"

    @property
    def model_dir(self) -> Path:
        """The model repository: configurations, weights and tokenizer."""
        return self.out_dir / "model"


def make_demo_assets(
    out_dir: Path, *, num_train: int, num_eval: int, minutes: float, seed: int
) -> DemoAssets:
    """Make the demo's files, or find them complete and made with the same arguments.

    See `make_once`: what is there is always complete, and assets of other settings are renamed.

    Args:
        out_dir: the directory to make.
        num_train: number of dialogues to train on.
        num_eval: number of held-out dialogues.
        minutes: length of each dialogue; they come out some seconds longer or shorter.
        seed: the same arguments give the same files.

    Raises:
        UserError: an argument is out of range, `out_dir` holds something else, espeak-ng is missing, or
            the codec uses its codebooks too unevenly.
    """
    settings = _check_settings(num_train, num_eval, minutes, seed)
    return _assets(make_once(Path(out_dir).absolute(), settings, _build))


def find_demo_assets(out_dir: Path) -> DemoAssets | None:
    """The assets in a directory, whatever their settings, or None if there are no complete ones."""
    found = find_made(out_dir)
    return None if found is None else _assets(found)


def _assets(made: MadeFolder) -> DemoAssets:
    return DemoAssets(made.path, made.settings, made.report, made.reused)


def _check_settings(num_train: int, num_eval: int, minutes: float, seed: int) -> dict[str, Any]:
    for name, count in (("num_train", num_train), ("num_eval", num_eval)):
        if count < 1:
            raise UserError(f"{name} is {count}, it must be at least 1.")
    if not 0 < minutes <= _MAX_MINUTES:
        raise UserError(f"minutes is {minutes}, it must be more than 0 and at most {_MAX_MINUTES:g}.")
    check_seed(seed)
    return {
        "format": _FORMAT,
        "num_train": num_train,
        "num_eval": num_eval,
        "minutes": float(minutes),
        "seed": seed,
    }


def _build(out_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Make all files below `out_dir` and return the report."""
    find_espeak()
    seconds: dict[str, float] = {}
    seed, model_dir = settings["seed"], out_dir / "model"
    with _timed(seconds, "speech"):
        splits = _make_recordings(out_dir / "data", settings)
    with _timed(seconds, "tokenizer"):
        model_dir.mkdir()
        write_tokenizer(model_dir / TOKENIZER_NAME, seed=seed)
    with _timed(seconds, "codec"):
        train_wavs = [out_dir / "data" / entry["path"] for entry in splits["train"]]
        mimi = fit_codec(train_wavs, seed=seed)
    with _timed(seconds, "moshi"):
        lm_config = tiny_moshi_config(text_card=VOCAB_SIZE, card=NUM_BINS)
        lm = make_tiny_moshi(lm_config, seed=seed)
        write_repository(model_dir, lm=lm, lm_config=lm_config, mimi=mimi, mimi_config=tiny_mimi_config())
    with _timed(seconds, "check"):
        # From the files, so that it holds for what others will load.
        uses = measure_codec(open_repository(model_dir).get_mimi(), train_wavs)
        demand_even_use(uses, num_bins=NUM_BINS)
    durations_sec = [entry["duration"] for entries in splits.values() for entry in entries]
    return {
        "seconds": seconds,
        "audio_hours": sum(durations_sec) / 3600,
        "vocabulary": VOCAB_SIZE,
        "max_entropy_bits": float(NUM_BINS.bit_length() - 1),
        "codebooks": [use._asdict() for use in uses],
    }


def _make_recordings(data_dir: Path, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Make all recordings and the two manifests; returns the entries of each."""
    jobs = []
    for split in ("train", "eval"):
        (data_dir / split).mkdir(parents=True)
        for index in range(settings[f"num_{split}"]):
            seed = f"{settings['seed']}/{split}/{index}"
            turns = make_dialogue(seed, duration_sec=60 * settings["minutes"])
            jobs.append(Job(turns, draw_user_voice(seed), data_dir / split / f"dialogue_{index:03d}.wav"))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for job, duration_sec in zip(jobs, render_all(jobs), strict=True):
        split = job.wav_path.parent.name
        splits[split].append({"path": f"{split}/{job.wav_path.name}", "duration": duration_sec})
    for split, entries in splits.items():
        (data_dir / f"{split}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return splits


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - start, 2)
