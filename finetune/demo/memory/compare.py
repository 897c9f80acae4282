"""How well the frames that need a memory are predicted, with TTT and without, on held-out dialogues.

Shapes: N frames of a dialogue, W words of its code.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from finetune.demo.memory.assets import Hearings
from finetune.demo.memory.dialogues import CODE_WORDS
from finetune.distributed import choose_device
from finetune.errors import DataError
from finetune.evaluation.long_context.statistics import Bootstrap, Estimate, differences, mean_ratio
from finetune.evaluation.long_context.stream_losses import stream_losses
from finetune.evaluation.long_context.streams import StreamOptions, open_streams
from finetune.inference.speech_model import load_speech_model
from moshi_ttt.hybrid_model import TTTMode

Arm = Literal["none", "ttt", "frozen"]
Part = Literal["first", "second", "second_sound", "others"]

ARMS: Mapping[Arm, str] = {
    "none": "without TTT",
    "ttt": "with TTT",
    "frozen": "the same, memory not learning",
}
PARTS: Mapping[Part, str] = {
    "first": "code, first time",
    "second": "code again",
    "second_sound": "its sound",
    "others": "all else",
}
GUESSING = math.log(len(CODE_WORDS))  # loss of a word of a code for who knows nothing of it, nats

_CHUNK_FRAMES = 256  # of a forward pass


class DialogueLosses(NamedTuple):
    """Losses of one dialogue in nats, NaN where there is no target.

    Attributes:
        text: of Moshi's text, which is where the words are, `[N]`.
        audio: of Moshi's voice, mean over its codebooks, `[N]`.
    """

    text: np.ndarray
    audio: np.ndarray


Losses = Mapping[str, DialogueLosses]  # by the dialogue's name


def measure(run_dir: Path, manifest: Path, mode: TTTMode = "on") -> dict[str, DialogueLosses]:
    """Stream each dialogue of a manifest through a trained model.

    Args:
        run_dir: of the training.
        manifest: of held-out dialogues.
        mode: what the memory does, see `load_speech_model`.

    Raises:
        UserError: the model or a dialogue cannot be used.
    """
    speech = load_speech_model(str(run_dir), device=choose_device("auto"), dtype=torch.float32, mode=mode)
    opened = open_streams(str(manifest), StreamOptions(user="real", text="given"), speech, speech.info)
    for name, reason in opened.failures.items():
        raise DataError(f"{name}: {reason}")
    losses = {}
    for stream in opened.streams:
        metrics = stream_losses(speech.lm, stream, chunk_frames=_CHUNK_FRAMES).metrics()
        losses[stream.name] = DialogueLosses(metrics["text"].numpy(), metrics["audio"].numpy())
    return losses


def select(losses: Losses, hearings: Mapping[str, Hearings], part: Part) -> list[np.ndarray]:
    """The losses of one part of each dialogue, in the order of `hearings`.

    Returns:
        Text losses of the words of the code (`first`, `second`) `[W]`; audio losses of the same frames
        (`second_sound`) `[W]`; text losses of all other frames (`others`) `[N - 2 W]`.
    """
    selected = []
    for name, heard in hearings.items():
        if part == "first":
            selected.append(losses[name].text[heard.first])
        elif part == "second":
            selected.append(losses[name].text[heard.second])
        elif part == "second_sound":
            selected.append(losses[name].audio[heard.second])
        else:
            selected.append(np.delete(losses[name].text, heard.first + heard.second))
    return selected


class Comparison(NamedTuple):
    """Mean losses with 95 % intervals over dialogues, nats.

    Attributes:
        means: by arm and part.
        differences: with TTT minus without, by part; negative where TTT is better.
    """

    means: dict[Arm, dict[Part, Estimate]]
    differences: dict[Part, Estimate]

    def to_json(self) -> dict[str, Any]:
        """As `results.json` has it."""
        means = {arm: {part: e._asdict() for part, e in by.items()} for arm, by in self.means.items()}
        return {"means": means, "ttt - none": {part: e._asdict() for part, e in self.differences.items()}}


def compare(losses: Mapping[Arm, Losses], hearings: Mapping[str, Hearings], *, seed: int = 0) -> Comparison:
    """Compare the arms on the same frames.

    Args:
        losses: of every arm.
        hearings: where the codes are.
        seed: of the draws of the bootstrap, which are dialogues.
    """
    bootstrap = Bootstrap(seed=seed)
    parts = {arm: {part: select(each, hearings, part) for part in PARTS} for arm, each in losses.items()}
    means = {arm: {part: _estimate(bootstrap, x) for part, x in by.items()} for arm, by in parts.items()}
    paired = {
        part: _estimate(bootstrap, differences(parts["ttt"][part], parts["none"][part])) for part in PARTS
    }
    return Comparison(means, paired)


def _estimate(bootstrap: Bootstrap, dialogues: Sequence[np.ndarray]) -> Estimate:
    return bootstrap.estimate(mean_ratio(dialogues))


def describe(comparison: Comparison) -> list[str]:
    """The comparison for people: a table, and the difference on the frames that need a memory."""
    width = max(map(len, ARMS.values()))
    lines = [
        f"loss in nats on held-out dialogues (who guesses a word of a code has {GUESSING:.3f})",
        f"{'':{width}}" + "".join(f"{title:>18}" for title in PARTS.values()),
    ]
    for arm, title in ARMS.items():
        values = "".join(f"{_number(comparison.means[arm][part].value):>18}" for part in PARTS)
        lines.append(f"{title:{width}}{values}")
    change = comparison.differences["second"]
    assert change.value is not None and change.interval is not None
    low, high = change.interval
    lines.append(
        f"code again, with TTT minus without: {change.value:+.3f} nats, 95 % interval {low:+.3f} to "
        f"{high:+.3f} over {change.num_recordings} dialogues"
    )
    verdict = (
        "predicts these words better" if high < 0 else "is no better at these words, by this measurement"
    )
    lines.append(f"The model with TTT {verdict}.")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
