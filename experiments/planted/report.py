"""The table and the picture of all seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from moshi.models.loaders import FRAME_RATE

from experiments.steps import seed_folders
from finetune.evaluation.out_folder import RESULTS_FILE
from finetune.files import read_json_object

MEASURES = {"text": "words", "audio": "all codebooks"}
_NAMES = {
    "on": "memory on",
    "sessions": "memory from an earlier session",
    "frozen": "memory frozen",
    "off": "memory off",
    "plain": "fine-tuned without TTT",
}

Arms = dict[str, list[Mapping[str, Any]]]  # summaries by lag, one per seed


def write_report(folder: Path) -> list[Path]:
    """Write `report.md` and `planted.png` of the seeds in a folder.

    Returns:
        The files.
    """
    arms = read_arms(folder)
    report, picture = folder / "report.md", folder / "planted.png"
    report.write_text("\n\n".join(table(arms, measure) for measure in MEASURES) + "\n", encoding="utf-8")
    plot(arms, picture)
    return [report, picture]


def read_arms(folder: Path) -> Arms:
    """The measurements of every arm, in order of the seeds."""
    arms: Arms = {}
    for seed in seed_folders(folder):
        for name in ("ttt", "none"):
            path = seed / f"recall_{name}" / RESULTS_FILE
            if path.is_file():
                for arm, summary in read_json_object(path)["arms"].items():
                    arms.setdefault(arm, []).append(summary)
    return {arm: arms[arm] for arm in _NAMES if arm in arms}


def table(arms: Arms, measure: str) -> str:
    """Markdown: right answers in percent by arm and lag, mean and seeds."""
    lags = _lags(arms)
    chance = next(iter(arms.values()))[0][str(lags[0])][measure]["chance"]
    lines = [
        f"| {MEASURES[measure]}, lag in frames | " + " | ".join(f"{lag:,}" for lag in lags) + " |",
        "|---|" + "---|" * len(lags),
    ]
    for arm, seeds in arms.items():
        cells = [_cell([100 * seed[str(lag)][measure]["accuracy"] for seed in seeds]) for lag in lags]
        lines.append(f"| {_NAMES[arm]} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| chance | {' | '.join([f'{100 * chance:.0f} %'] * len(lags))} |"])


def plot(arms: Arms, path: Path) -> None:
    """Right answers over the lag, a line per arm with its seeds behind."""
    lags = _lags(arms)
    seconds = [lag / FRAME_RATE for lag in lags]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, 2, sharey=True), MEASURES.items(), strict=True):
        for color, (arm, seeds) in enumerate(arms.items()):
            lines = np.array([[100 * seed[str(lag)][measure]["accuracy"] for seed in seeds] for lag in lags])
            axes.plot(seconds, lines, color=f"C{color}", alpha=0.25, linewidth=0.8)
            axes.plot(seconds, lines.mean(1), color=f"C{color}", marker="o", markersize=3, label=_NAMES[arm])
        axes.set_xscale("log")
        axes.set_xlabel("lag (s)")
        axes.set_title(title)
        axes.set_ylim(0, 102)
    figure.axes[0].set_ylabel("right answers (%)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _lags(arms: Arms) -> list[int]:
    return sorted(map(int, next(iter(arms.values()))[0]))


def _cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} % ({', '.join(f'{value:.0f}' for value in values)})"
