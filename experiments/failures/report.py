"""The table and the figures of the cases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.monitoring.diagnosis import diagnose_run
from finetune.monitoring.diagnosis_report import write_report


def cases_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what was found since when, and the losses."""
    lines = ["| case | found (since step) | as expected | first and last loss |", "|---|---|---|---|"]
    for result in results.values():
        found = ", ".join(f"{name} ({result['first_step'][name]})" for name in result["found"])
        lines.append(
            f"| {result['title']} | {found or 'nothing'} | {'yes' if result['as_expected'] else 'no'} | "
            f"{result['loss_first']:.2f}, {result['loss_last']:.2f} |"
        )
    return "\n".join(lines)


def leak_table(leaks: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: the losses of `causal` true and false."""
    lines = ["| `ttt.causal` | loss as trained | loss in a stream | best possible |", "|---|---|---|---|"]
    for causal, loss in leaks.items():
        lines.append(
            f"| {causal} | {loss['as_trained']:.3f} | {loss['streamed']:.3f} | {loss['chance']:.3f} |"
        )
    return "\n".join(lines)


def write_figures(folder: Path, names: list[str]) -> None:
    """Beside the cases, a figure of each."""
    for name in names:
        write_report(diagnose_run(folder / name), folder / f"{name}.png")
