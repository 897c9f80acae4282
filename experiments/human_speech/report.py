"""Tables of all seeds: losses by position, and what is recalled by lag."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from experiments.human_speech.losses import (
    METRICS,
    SPANS,
    Losses,
    Row,
    mean_over_seeds,
    read_losses,
    rows,
)
from experiments.human_speech.recordings import REACH
from experiments.human_speech.runs import LONG_ATTENTION, MODELS
from experiments.steps import seed_folders
from finetune.evaluation.long_context.arms import PLAIN
from finetune.evaluation.long_context.statistics import Estimate
from finetune.evaluation.out_folder import RESULTS_FILE
from finetune.files import read_json_object

_ARMS = {"on": "memory on", "frozen": "frozen", "off": "off"}
_WITHOUT = "fine-tuned without TTT"
_LONG = f"attention of {LONG_ATTENTION} frames"
_MEASURES = ("text", "audio")
_NOTHING = "—"


def write_report(folder: Path) -> Path:
    """Write `report.md` of the seeds in a folder and return its path."""
    seeds = seed_folders(folder)
    arms = {
        name: [read_losses(seed / "long-context_ttt", arm) for seed in seeds] for arm, name in _ARMS.items()
    }
    for model, name in (("none", _WITHOUT), ("long", _LONG)):
        arms[name] = [read_losses(seed / f"long-context_{model}", PLAIN) for seed in seeds]
    headroom = {name: mean_over_seeds(arms[name]) for name in (_LONG, _WITHOUT)}
    parts = []
    for metric in METRICS:
        parts.append(loss_table({name: mean_over_seeds(each) for name, each in arms.items()}, metric))
        for index, seed in enumerate(seeds):
            own = beyond_reach({name: each[index] for name, each in arms.items()}, metric)
            parts.append(f"{seed.name}, {metric}, {own}")
        parts.append(f"what lies beyond reach, {metric}, {beyond_reach(headroom, metric)}")
    parts += [recall_table(seeds, measure) for measure in _MEASURES]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def loss_table(arms: Mapping[str, Losses], metric: str) -> str:
    """Markdown: nats by position, and differences with intervals over recordings."""
    found = rows(arms, metric)
    heads = [f"{start:,} to {stop:,}" if stop else f"from {start:,}" for start, stop in SPANS]
    lines = [f"| {metric}, frames | {' | '.join(heads)} |", "|---|" + "---|" * len(SPANS)]
    lines += [f"| {row.name} | {' | '.join(_cells(row))} |" for row in found]
    counts = [f"{each.num_frames:,} in {each.num_recordings}" for each in found[0].estimates]
    return "\n".join([*lines, f"| frames in recordings | {' | '.join(counts)} |"])


def beyond_reach(arms: Mapping[str, Losses], metric: str) -> str:
    """The differences of all frames beyond reach, in a line."""
    compared = [f"{row.name}: {_cells(row)[-1]}" for row in rows(arms, metric) if row.is_difference]
    return f"from {REACH}: {'; '.join(compared)}"


def recall_table(seeds: Sequence[Path], measure: str) -> str:
    """Markdown: answers told apart in percent, and the margin in nats, by kind, arm and lag.

    Means of the seeds; of the margin also the range.
    """
    found: dict[tuple[str, str], list[dict[str, dict[str, dict[str, float]]]]] = {}
    for seed in seeds:
        for model in MODELS:
            for kind, arms in read_json_object(seed / f"recall_{model}" / RESULTS_FILE)["kind"].items():
                for arm, by_lag in arms.items():
                    arm = model if arm == PLAIN else arm
                    found.setdefault((kind, arm), []).append(by_lag)
    lags = list(next(iter(found.values()))[0])
    heads = " | ".join(f"{int(lag):,}" for lag in lags)
    lines = [f"| {measure}, lag in frames | arm | chance | {heads} |", "|---|---|---|" + "---|" * len(lags)]
    for (kind, arm), results in sorted(found.items()):
        chance = results[0][lags[0]][measure]["chance"]
        cells = " | ".join(_recalled([result[lag][measure] for result in results]) for lag in lags)
        lines.append(f"| {kind} | {arm} | {100 * chance:.0f} % | {cells} |")
    return "\n".join(lines)


def _recalled(seeds: Sequence[Mapping[str, float]]) -> str:
    shares, margins = ([seed[name] for seed in seeds] for name in ("told_apart", "margin"))
    spread = f"{fmean(margins):+.3f} ({min(margins):+.3f} to {max(margins):+.3f})"
    return f"{100 * fmean(shares):.0f} %, {spread}"


def _cells(row: Row) -> list[str]:
    return [_difference(each) if row.is_difference else _mean(each) for each in row.estimates]


def _mean(estimate: Estimate) -> str:
    return _NOTHING if estimate.value is None else f"{estimate.value:.3f}"


def _difference(estimate: Estimate) -> str:
    if estimate.value is None:
        return _NOTHING
    if estimate.interval is None:
        return f"{estimate.value:+.4f}"
    low, high = estimate.interval
    return f"{estimate.value:+.4f} [{low:+.4f}, {high:+.4f}]"
