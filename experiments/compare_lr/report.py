"""The table and the figure of the comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from experiments.compare_lr.runs import ARMS
from moshi_ttt.files.atomic_file import replacing

Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # of an arm, a run for each seed


def table(runs: Runs) -> str:
    """Markdown: gates and losses at the end, mean over the seeds and each; at the start above them."""
    lines = [
        "| arm | rates of base, TTT weights, gates | mean change of alpha (seeds) | training loss (seeds) | "
        "held-out text loss (seeds) | held-out audio loss (seeds) | findings |",
        "|---|---|---|---|---|---|---|",
    ]
    first = [run["train"]["loss"][0] for run in next(iter(runs.values()))]  # the same in each arm
    lines.append(f"| before the first step | | 0 | {_mean_and_each(first, '.3f')} | | | |")
    for name, same in runs.items():
        rates = ", ".join(f"{rate:g}" for rate in same[0]["rates"].values())
        cells = [
            _mean_and_each([run["train"]["ttt_delta"][-1] for run in same], ".4f"),
            _mean_and_each([mean(run["train"]["loss"][-10:]) for run in same], ".3f"),
            *(_mean_and_each([run["eval"][key][-1] for run in same], ".3f") for key in _HELD_OUT),
        ]
        found = ", ".join(dict.fromkeys(name for run in same for name in run["findings"])) or "nothing"
        lines.append(f"| {ARMS[name].title} | {rates} | {' | '.join(cells)} | {found} |")
    return "\n".join(lines)


_HELD_OUT = ("text_loss", "audio_loss")


def write_figure(runs: Runs, path: Path) -> None:
    """How far the gates went, the training loss, the held-out loss: a colour per arm, a line per seed."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    gates, losses, held_out = figure.subplots(1, 3)
    for color, (name, same) in enumerate(runs.items()):
        for number, run in enumerate(same):
            style = {"color": f"C{color}", "label": ARMS[name].title if number == 0 else None}
            gates.plot(run["train"]["step"], run["train"]["ttt_delta"], **style)
            losses.plot(run["train"]["step"], run["train"]["loss"], linewidth=0.8, **style)
            total = [sum(pair) for pair in zip(*(run["eval"][key] for key in _HELD_OUT), strict=True)]
            held_out.plot(run["eval"]["step"], total, marker="o", markersize=3, **style)
    gates.set_ylabel("mean |change of alpha|")
    losses.set_ylabel("training loss (nats)")
    held_out.set_ylabel("held-out loss, text + audio (nats)")
    for axes in (gates, losses, held_out):
        axes.set_xlabel("step")
        axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=80)


def _mean_and_each(values: Sequence[float], spec: str) -> str:
    each = ", ".join(format(value, spec) for value in values)
    return f"{mean(values):{spec}} ({each})" if len(values) > 1 else each
