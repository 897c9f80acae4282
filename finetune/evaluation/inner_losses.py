"""`evaluate.py trajectories`: a table, plots and a summary of inner-loop trajectories."""

import argparse
from pathlib import Path

from finetune.errors import ConfigError
from finetune.files import write_json
from finetune.inference.terminal import say
from finetune.monitoring.inner_loop_log import INNER_LOSSES_FILE, read_inner_losses
from finetune.monitoring.plots import plot_trajectories
from finetune.monitoring.trajectories import Trajectories, load_trajectories, summarise, summary_lines

HELP = "inner losses per layer and frame: with W0, before and after the frame's own step"
SUMMARY_FILE = "summary.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help=f"a run directory, its {INNER_LOSSES_FILE}, or a trajectories file of an evaluation",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of plots and summary (trajectories/… beside the file)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="which record of a run (the last)")


def run(options: argparse.Namespace) -> None:
    """Print a table, write plots and summary.

    Raises:
        UserError: an option or the record of a run cannot be used.
        StateError: a trajectories file cannot be used.
    """
    if "" in (options.path, options.out):
        raise ConfigError("PATH and --out: an empty one is no path.")
    path = Path(options.path)
    trajectories, place = _load(path, options.step)
    out = place if options.out is None else Path(options.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; give a folder.")
    summaries = {index: summarise(losses) for index, losses in trajectories.losses.items()}
    for line in summary_lines(summaries):
        say(line)
    plots = plot_trajectories(trajectories.losses, out, title=_title(trajectories, path))
    layers = {str(index): summary.to_json() for index, summary in summaries.items()}
    write_json(out / SUMMARY_FILE, {"source": str(path), "facts": trajectories.facts, "layers": layers})
    say(f"plots: {', '.join(str(plot) for plot in plots)}")
    say(f"summary: {out / SUMMARY_FILE}")


def _load(path: Path, step: int | None) -> tuple[Trajectories, Path]:
    """The trajectories, and the folder of what is made of them unless another is asked for."""
    if path.is_dir():
        if not (path / INNER_LOSSES_FILE).is_file():
            raise ConfigError(
                f"{path}: has no {INNER_LOSSES_FILE}; give a run that was trained with "
                "ttt.log_inner_loop_losses: true, or a trajectories file."
            )
        path = path / INNER_LOSSES_FILE
    folder = path.parent / "trajectories"
    if path.suffix == ".jsonl":
        record = read_inner_losses(path, step)
        return Trajectories(record.losses, {"step": record.step}), folder / f"step_{record.step:06d}"
    if step is not None:
        raise ConfigError(f"--step: {path} is not the record of a run and has no steps; leave it out.")
    return load_trajectories(path), folder / path.stem  # recordings of one evaluation lie in one folder


def _title(trajectories: Trajectories, path: Path) -> str:
    step = trajectories.facts.get("step")
    return path.stem if step is None else f"step {step}"
