"""The work of `evaluate.py long-context`: losses along recordings, their scores and pictures."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.base_model.conditions import condition_names
from finetune.errors import ConfigError, DataError
from finetune.evaluation.identity import home_of, model_identity, weights_key
from finetune.evaluation.long_context.arms import choose_arms, override_windows
from finetune.evaluation.long_context.measure import LossFiles, MeasuredRecordings, measure_recordings
from finetune.evaluation.long_context.options import add_options, check, score_settings, stream_options
from finetune.evaluation.long_context.plot import plot_losses
from finetune.evaluation.long_context.results import ScoreSettings, losses_by_arm, score, write_positions
from finetune.evaluation.long_context.streams import OpenedStreams, open_streams
from finetune.evaluation.long_context.table import score_tables
from finetune.evaluation.out_folder import (
    RESULTS_FILE,
    check_default,
    check_out,
    check_settings,
    make_folder_of,
)
from finetune.files import hash_json, write_json
from finetune.inference.options import load_from_options
from finetune.inference.speech_model import SpeechModel
from finetune.inference.terminal import say
from finetune.monitoring.plots import plot_trajectories
from finetune.monitoring.trajectories import load_trajectories, mean_trajectories, summarise, summary_lines
from finetune.ttt_integration import window_lines
from moshi_ttt.files.atomic_file import replacing
from moshi_ttt.hybrid_model import ttt_layers

__all__ = ["HELP", "add_options", "run"]

HELP = "losses at every frame of hours of speech, with the memory learning, frozen and left out"
POSITIONS_FILE = "positions.csv"
PLOT_FILE = "losses.png"
TRAJECTORIES_DIR = "trajectories"
STREAMS_DIR = "streams"


def run(options: argparse.Namespace) -> None:
    """Measure, write and print.

    Raises:
        UserError: an option, a file or the checkpoint cannot be used, or too many recordings failed.
        StateError: losses cannot be written.
    """
    check(options)
    streams_are = stream_options(options)
    check_out(options.out)
    speech = load_from_options(options)
    if options.trajectories and not ttt_layers(speech.lm):
        raise ConfigError(f"--trajectories: {speech.checkpoint.folder} has no TTT layers; leave it out.")
    arms = choose_arms(speech.lm, compare=options.compare, source=str(speech.checkpoint.folder))
    changed = override_windows(
        speech.lm,
        ttt_layer_context=options.ttt_layer_context,
        non_ttt_layer_context=options.non_ttt_layer_context,
    )
    model = model_identity(speech, fuse_lora=not options.no_fuse_lora)
    _say_model(speech, arms, changed)
    settings = _folder_settings(options, model)
    folder = _folder(options, speech, settings)
    check_settings(folder, settings)
    check_default(folder)
    streams_are = replace(streams_are, placing=speech.checkpoint.text)
    opened = open_streams(options.data, streams_are, speech, speech.info)
    _say_streams(opened)
    make_folder_of(folder, settings, STREAMS_DIR)
    say(f"results: {folder}")
    files = LossFiles(folder / STREAMS_DIR, weights_key(model), own_text=options.text == "own")
    measured = measure_recordings(
        speech.lm,
        opened.streams,
        arms=arms,
        files=files,
        chunk_frames=options.chunk_frames,
        conditions=speech.conditions,
        trajectories=folder / TRAJECTORIES_DIR if options.trajectories else None,
    )
    _report(folder, options, model, arms, opened, measured)
    failures = opened.failures | measured.failures
    if len(failures) > options.max_failures:
        first = _failure_line(*next(iter(failures.items())))
        raise DataError(
            f"--max-failures: {len(failures)} of the recordings failed, {options.max_failures} may; "
            f"{first.rstrip('.')}. The others are in {folder}."
        )


def _failure_line(name: str, reason: str) -> str:
    """A reason most often names the file already."""
    return reason if name in reason else f"{name}: {reason}"


def _say_model(speech: SpeechModel, arms: Sequence[str], changed: Mapping[str, int]) -> None:
    checkpoint = speech.checkpoint
    say(f"model: {checkpoint.folder} (step {checkpoint.step}), arms: {', '.join(arms)}")
    for name in condition_names(speech.lm):
        say(f"condition of all recordings: {name} {speech.conditions.get(name, 'unknown')!r}")
    for option, num_layers in changed.items():
        say(f"{option}: set in {num_layers} layers")
    for line in window_lines(speech.lm):
        say(line)


def _say_streams(opened: OpenedStreams) -> None:
    total = sum(stream.num_frames for stream in opened.streams)
    say(f"data: recordings: {len(opened.streams)}, frames: {total:,}, left out: {len(opened.left_out)}")
    for name, reason in opened.failures.items():
        say(f"failed: {_failure_line(name, reason)}")


def _folder_settings(options: argparse.Namespace, model: Mapping[str, Any]) -> dict[str, Any]:
    """What may not differ between two measurements in one folder."""
    data = {name: getattr(options, name) for name in ("user", "text", "group", "max_frames", "min_frames")}
    return {**weights_key(model), "data": _data_path(options), **data}


def _folder(options: argparse.Namespace, speech: SpeechModel, settings: Mapping[str, Any]) -> Path:
    """Where the results go; without --out the same settings go to the same folder."""
    if options.out is not None:
        return Path(options.out)
    home = home_of(speech.checkpoint, given=options.checkpoint)
    name = f"step_{speech.checkpoint.step:06d}-{hash_json(settings)[:8]}"
    return home / "evaluation" / "long_context" / name


def _report(
    folder: Path,
    options: argparse.Namespace,
    model: Mapping[str, Any],
    arms: Sequence[str],
    opened: OpenedStreams,
    measured: MeasuredRecordings,
) -> None:
    settings = score_settings(options)
    losses = losses_by_arm(measured.recordings, arms)
    results = {
        "kind": "moshi-ttt long-context losses",
        "version": 1,
        **score(losses, settings),
        "failures": opened.failures | measured.failures,
        "left_out": opened.left_out,
        "model": dict(model),
        "data": _data_entry(options, measured, folder),
        "settings": _settings_entry(options, arms, settings),
    }
    try:
        with replacing(folder / RESULTS_FILE) as partial:
            write_json(partial, results)
        write_positions(folder / POSITIONS_FILE, losses, settings.bin_frames)
        plot_losses(folder / PLOT_FILE, losses, settings.bootstrap())
    except OSError as error:
        raise ConfigError(f"--out: {folder}: cannot be written: {error.strerror}.") from None
    _say_results(results, measured)
    if options.trajectories and measured.recordings:
        _report_trajectories(folder / TRAJECTORIES_DIR, measured)


def _report_trajectories(folder: Path, measured: MeasuredRecordings) -> None:
    """Summaries of the inner losses by recording, and a plot per layer of their means."""
    found = {
        recording.name: load_trajectories(recording.trajectories).losses
        for recording in measured.recordings
        if recording.trajectories is not None
    }
    summaries = {
        name: {str(index): summarise(losses).to_json() for index, losses in layers.items()}
        for name, layers in found.items()
    }
    write_json(folder / "summary.json", summaries)
    means = mean_trajectories(list(found.values()))
    say()
    say("inner losses, means over the recordings by frame:")
    for line in summary_lines({index: summarise(losses) for index, losses in means.items()}):
        say(line)
    title = f"mean of {len(found)} recordings" if len(found) > 1 else next(iter(found))
    plots = plot_trajectories(means, folder, title=title)
    say(f"plots: {', '.join(map(str, plots))}")


def _data_entry(options: argparse.Namespace, measured: MeasuredRecordings, folder: Path) -> dict[str, Any]:
    recordings = [
        {
            "name": recording.name,
            "num_frames": recording.num_frames,
            "codes_sha256": recording.codes_sha256,
            "files": {arm: path.relative_to(folder).as_posix() for arm, path in recording.files.items()},
            "memory_resets": {arm: losses.memory_resets for arm, losses in recording.losses.items()},
        }
        for recording in measured.recordings
    ]
    return {"path": _data_path(options), "recordings": recordings}


def _settings_entry(
    options: argparse.Namespace, arms: Sequence[str], settings: ScoreSettings
) -> dict[str, Any]:
    named = ("user", "text", "group", "max_frames", "min_frames", "chunk_frames", "max_failures")
    return {"arms": list(arms), **{name: getattr(options, name) for name in named}, **vars(settings)}


def _data_path(options: argparse.Namespace) -> str:
    return os.path.abspath(Path(options.data).expanduser())


def _say_results(results: Mapping[str, Any], measured: MeasuredRecordings) -> None:
    if measured.num_reused:
        say(f"{measured.num_reused} measurements were there already")
    for line in score_tables(results):
        say(line)
    if len(measured.recordings) == 1:
        say("no intervals: they would need at least two recordings")
    for recording in measured.recordings:
        for arm, losses in recording.losses.items():
            if losses.memory_resets:
                say(f"memory: {losses.memory_resets} resets of fast weights in {recording.name} [{arm}]")
    for name, reason in measured.failures.items():
        say(f"failed: {_failure_line(name, reason)}")
