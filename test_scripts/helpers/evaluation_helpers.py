"""Recordings of random codes for tests of the evaluation."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from conftest import make_codes
from finetune.args import TTTArgs
from finetune.commands import run_command
from finetune.evaluation.command import evaluate
from finetune.ttt_integration import apply_ttt_to_model


def run_evaluate(capsys, *arguments) -> tuple[int, str, list[str]]:
    """Run evaluate.py's work in this process; exit status, output and error lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: evaluate([str(part) for part in arguments]))
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    return exit_.value.code, captured.out, errors


def failure(command, folder, /, *options, **settings) -> str:
    """The one line with which a command refuses its options, having written nothing into the folder."""
    before = sorted(folder.rglob("*"))
    status, _, errors = command(*options, **settings)
    assert (status, len(errors)) == (2, 1), errors
    assert sorted(folder.rglob("*")) == before
    return errors[0]


@dataclass
class FakeStream:
    """A recording whose codes `[1 + n_q, N]` are in memory."""

    name: str
    codes: Tensor

    @property
    def num_frames(self) -> int:
        return self.codes.shape[1]

    def frames(self, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= self.num_frames, (start, stop)
        return self.codes[:, start:stop]


def random_stream(lm, num_frames: int, *, seed: int = 0, user: bool = False) -> FakeStream:
    """Random codes; the user's are zero tokens unless asked for."""
    codes = make_codes(lm, 1, num_frames, seed=seed)[0]
    if not user:
        codes[1 + lm.dep_q :] = lm.zero_token_id
    return FakeStream(f"recording {seed}", codes)


def open_ttt(lm, **overrides):
    """Patch a model with two TTT layers whose gates are open and whose memory learns fast."""
    settings = {"mini_batch_size": 4, "initial_gating_alpha": 0.5, "base_lr": 5.0, "layers": "1,3"}
    apply_ttt_to_model(lm, TTTArgs(enable=True, **(settings | overrides)))
    return lm.eval()


def nearly_equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal where neither is NaN, and NaN in the same places."""
    return torch.equal(a.isnan(), b.isnan()) and bool((a - b).nan_to_num(0).abs().max() < tolerance)
