"""The picture of the comparison: loss by frame around both times that the code is said.

Shapes: F frames around a code.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.demo.memory.assets import Hearings
from finetune.demo.memory.compare import ARMS, GUESSING, Arm, Losses
from finetune.demo.memory.dialogues import RECALL_WORDS, WORD_FRAMES
from finetune.evaluation.long_context.statistics import Bootstrap, mean_ratio
from moshi_ttt.files.atomic_file import replacing

_BEFORE, _AFTER = 9, 3  # frames shown around a code
_CODE_FRAMES = RECALL_WORDS * WORD_FRAMES
_SHOWN: tuple[Arm, ...] = ("none", "ttt")


def plot_comparison(path: Path, losses: Mapping[Arm, Losses], hearings: Mapping[str, Hearings]) -> None:
    """Draw the mean text loss by frame, without TTT and with, and mark the second time.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    first, second = figure.subplots(1, 2, sharey=True)
    for axes, starts, title in (
        (first, {name: heard.first[0] for name, heard in hearings.items()}, "the code, first time"),
        (second, {name: heard.second[0] for name, heard in hearings.items()}, "the code again"),
    ):
        for color, arm in zip(("C1", "C0"), _SHOWN, strict=True):
            _plot_line(axes, losses[arm], starts, label=ARMS[arm], color=color)
        axes.axhline(GUESSING, color="grey", linestyle="dashed", linewidth=0.8, label="guessing a word")
        axes.set_title(title)
        axes.set_xlabel("frame from the start of the code (80 ms)")
    second.axvspan(-0.5, _CODE_FRAMES - 0.5, color="C2", alpha=0.12, label="second hearing")
    first.set_ylabel("text loss (nats)")
    second.legend(loc="upper left")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _plot_line(axes: Axes, losses: Losses, starts: Mapping[str, int], *, label: str, color: str) -> None:
    """A thin line through all frames, and dots with their intervals where words of the code start."""
    frames = np.arange(-_BEFORE, _CODE_FRAMES + _AFTER)
    shown = np.stack([losses[name].text[start + frames] for name, start in starts.items()])  # [dialogues, F]
    bootstrap = Bootstrap()
    estimates = [bootstrap.estimate(mean_ratio(column[:, None])) for column in shown.T]
    values = np.array([np.nan if e.value is None else e.value for e in estimates])
    bands = np.array([(np.nan, np.nan) if e.interval is None else e.interval for e in estimates])
    words = np.isin(frames, np.arange(0, _CODE_FRAMES, WORD_FRAMES))
    axes.plot(frames, values, color=color, alpha=0.35, linewidth=1)
    axes.plot(frames[words], values[words], "o-", color=color, label=label)
    axes.fill_between(frames[words], *bands[words].T, color=color, alpha=0.2, linewidth=0)
