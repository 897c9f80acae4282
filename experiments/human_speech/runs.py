"""The steps of the experiment: dialogues, files, trainings and measurements; each is done once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.human_speech.items import write_human_items
from experiments.human_speech.recordings import read_manifest, write_model, write_set
from experiments.steps import run_python, train_once
from finetune.demo.made_folder import make_once

BASE_CONFIG, CONFIG = "human_speech_base.yaml", "human_speech.yaml"
LONG_ATTENTION = 512  # frames, a chunk of the fine-tuning
MODELS: dict[str, dict[str, object]] = {  # what each fine-tuning changes in CONFIG
    "ttt": {},
    "none": {"ttt.layers": "none"},
    "long": {"ttt.layers": "none", "ttt.non_ttt_layer_context": LONG_ATTENTION},
}
LAGS = "50f,125f,250f,500f,1000f"
ITEMS_DIR = "items"

_FORMAT = 1  # raise it when the same settings make other files
_SEED = 1  # of files and of the base


@dataclass(frozen=True)
class Settings:
    """What is to be done.

    Attributes:
        sources: of the dialogues, by name.
        packages: folder of the Debian packages, None: beside the dialogues.
        groups: of items, by kind and source.
        base_steps, steps: of the trainings, None: the configurations'.
    """

    sources: Sequence[str]
    packages: Path | None
    groups: int
    base_steps: int | None
    steps: int | None


def make_base(folder: Path, settings: Settings) -> int:
    """Fetch dialogues, write files and train the base; returns the first exit status that is not 0.

    Raises:
        UserError: a file cannot be made or used.
    """
    for source in settings.sources:
        place = [] if settings.packages is None else ["--packages", settings.packages]
        out = ["--out", dialogues_dir(folder, source), *place]
        if status := run_python("-m", "finetune.demo.human_dialogues", source, *out):
            return status
    made = {"kind": "human speech", "format": _FORMAT, "seed": _SEED}
    choices: dict[str, Any] = {
        "sources": list(settings.sources),
        "groups": settings.groups,
        "dialogues": str(folder.absolute()),
    }
    make_once(assets_dir(folder).absolute(), made | choices, _build)
    return train_once(BASE_CONFIG, folder / "base", _files(folder) | {"max_steps": settings.base_steps})


def fine_tune(folder: Path, settings: Settings, *, seed: int) -> int:
    """Fine-tune each of `MODELS` and measure its losses; returns the first exit status that is not 0.

    Raises:
        UserError: a file cannot be used.
    """
    tuned = _files(folder) | {"init_from": folder / "base", "seed": seed, "max_steps": settings.steps}
    own = folder / f"seed{seed}"
    for name, changes in MODELS.items():
        if status := train_once(CONFIG, own / name, tuned | changes):
            return status
    data = ["--data", assets_dir(folder) / "eval.jsonl", "--user", "real", "--text", "given"]
    for name in MODELS:
        compared = ["--compare"] if name == "ttt" else []
        out = ["--out", own / f"long-context_{name}"]
        model = ["--checkpoint", own / name]
        if status := run_python("evaluate.py", "long-context", *model, *data, *compared, *out):
            return status
    return 0


def recall(folder: Path, *, seed: int) -> int:
    """Measure what each of `MODELS` recalls; returns the first exit status that is not 0."""
    own = folder / f"seed{seed}"
    items = ["--data", assets_dir(folder) / ITEMS_DIR, "--lags", LAGS]
    for name in MODELS:
        options = ["--checkpoint", own / name, *items, "--out", own / f"recall_{name}"]
        if status := run_python("evaluate.py", "recall", *options):
            return status
    return 0


def dialogues_dir(folder: Path, source: str) -> Path:
    """Where the dialogues of a source are."""
    return folder / "dialogues" / source


def assets_dir(folder: Path) -> Path:
    """Where the model, the manifests and the items are."""
    return folder / "assets"


def _files(folder: Path) -> dict[str, object]:
    assets = assets_dir(folder)
    return {
        "moshi_paths.hf_repo_id": assets / "model",
        "data.train_data": assets / "train.jsonl",
        "data.eval_data": assets / "eval.jsonl",
    }


def _build(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the files below `folder`; the report is empty."""
    sources = {source: dialogues_dir(Path(settings["dialogues"]), source) for source in settings["sources"]}
    splits = {
        split: {name: read_manifest(path / "data" / f"{split}.jsonl") for name, path in sources.items()}
        for split in ("train", "eval")
    }
    write_set(folder, "train", splits["train"], both=True)
    write_set(folder, "eval", splits["eval"], both=False)
    recordings = [dialogue.path for dialogues in splits["train"].values() for dialogue in dialogues]
    write_model(folder / "model", recordings, seed=settings["seed"])
    write_human_items(
        folder / ITEMS_DIR, splits["eval"], groups_per_kind=settings["groups"], seed=settings["seed"]
    )
    return {}
