"""Shared fixtures: a tiny Moshi of the real class, random TTT inputs, and small demo assets."""

import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.commands import run_command
from finetune.demo.assets import DemoAssets, make_demo_assets
from finetune.demo.model_folder import write_random_repository
from finetune.demo.tiny_moshi import tiny_moshi_config
from finetune.distributed import ConsoleHandler
from finetune.training import run as run_module
from run_helpers import write_untrained_run

torch.set_num_threads(1)

# Started first, so that no process waits for one of them at the end while the other has nothing left.
LONGEST_FILES = (
    "test_distributed.py",
    "test_benchmarks.py",
    "test_backends.py",
    "test_docs_commands.py",
    "test_interruption.py",
    "test_data_encode.py",
    "test_diagnostics.py",
    "test_condition_runs.py",
    "test_training.py",
)
DEMO_SETTINGS = {"num_train": 2, "num_eval": 1, "minutes": 1 / 3, "seed": 0}


class LetterTokenizer:
    """One token per letter, to be worked out by hand: a is 11, b is 12, and so on; a line break is 5."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return [5 if letter == "\n" else ord(letter) - ord("a") + 11 for letter in text]

    def id_to_piece(self, token: int) -> str:
        """The letter of a token."""
        return "\n" if token == 5 else chr(token - 11 + ord("a"))

    def is_byte(self, token: int) -> bool:
        """No token is."""
        return False

    def is_unknown(self, token: int) -> bool:
        """No token is."""
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; the rest stays as collected."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def make_tiny_lm(*, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> LMModel:
    """A tiny Moshi with fresh weights that computes in the dtype of the model.

    Moshi's own norm and rotary positions round to float32 inside, where a difference of 1e-16 can come out
    as 6e-8: `norm="rms_norm_f32", positional_embedding="rope"` gives those.
    """
    settings = {
        "text_card": 48,
        "card": 20,
        "dim": 32,
        "context": 40,
        "norm": "rms_norm",
        "positional_embedding": "sin",
        "depformer_dim": 16,
        "depformer_dim_feedforward": 66,
        "depformer_num_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LMModel(device="cpu", dtype=dtype, **tiny_moshi_config(**(settings | overrides)))


def make_codes(lm: LMModel, batch_size: int, num_frames: int, *, seed: int = 0) -> Tensor:
    """Random codes `[B, 1 + n_q, T]`."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(lm.text_card, (batch_size, 1, num_frames), generator=generator)
    audio = torch.randint(lm.card, (batch_size, lm.n_q, num_frames), generator=generator)
    return torch.cat([text, audio], 1)


@pytest.fixture
def tiny_lm() -> LMModel:
    """A fresh float64 model in evaluation mode."""
    return make_tiny_lm().eval()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoAssets:
    """Two training dialogues and an evaluation dialogue of 20 s, with tokenizer, codec and model."""
    folder: Path = tmp_path_factory.mktemp("demo")
    return make_demo_assets(folder / "assets", **DEMO_SETTINGS)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model with random weights in a local folder."""
    return write_random_repository(tmp_path_factory.mktemp("base") / "base-model")


@pytest.fixture(scope="session")
def untrained_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run directories with one checkpoint per mode, made when first asked for, without training."""
    made: dict[str, Path] = {}

    def run(mode: str) -> Path:
        if mode not in made:
            made[mode] = write_untrained_run(tmp_path_factory.mktemp("runs") / mode, mode, tiny_base)
        return made[mode]

    return run


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """Put folders where the Hub's client keeps what it has downloaded, with the network switched off."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, folder: Path, *, branch: str = "main") -> str:
        commit = hashlib.sha1(f"{repository} {branch}".encode()).hexdigest()
        home = cache / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, home / "snapshots" / commit)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / branch).write_text(commit)
        return commit

    return put


@pytest.fixture(autouse=True)
def _end_of_its_own_logging():
    """What one test sets up to log to the terminal says nothing in the next one."""
    yield
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, ConsoleHandler):
            logging.getLogger().removeHandler(handler)


@pytest.fixture
def logs(monkeypatch):
    """The messages of a caplog, which the logging of a run would otherwise displace."""
    monkeypatch.setattr(
        run_module, "set_up_logging", lambda: logging.getLogger("finetune").setLevel(logging.INFO)
    )
    return lambda caplog: [record.getMessage() for record in caplog.records]


@pytest.fixture
def command(capsys):
    """Run a command's work in this process; exit status, output and error lines."""

    def run(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: main([str(part) for part in arguments]))
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        return exit_.value.code, captured.out, errors

    return run
