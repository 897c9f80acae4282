"""What is done with a command of the documentation, in a workspace: it runs, or its arguments are checked.

A check takes the command and a monkeypatch, and raises where the command would not work.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import MagicMock

from huggingface_hub.commands.download import DownloadCommand
from pytest import MonkeyPatch
from tensorboard.program import TensorBoard
from torch.distributed.run import get_args_parser

from docs_commands import ROOT, Command
from docs_workspace import succeed
from experiments.compare_lr import __main__ as compare_lr
from experiments.failures import __main__ as failures
from experiments.failures.cases import CASES
from experiments.fine_tuning.studies import Plan as FineTuningPlan
from experiments.recall.studies import Plan
from experiments.recall.training import Schedule
from finetune.annotation import command as annotation
from finetune.config_io import load_train_args
from finetune.demo.debian_prompts.prompts import LANGUAGES, prompt_packages
from finetune.demo.human_dialogues.sources import SOURCES
from finetune.evaluation import command as evaluation
from finetune.evaluation.command import _prepare as prepare_measurement
from finetune.evaluation.duplex import command as duplex
from finetune.evaluation.duplex import wer
from finetune.evaluation.word_errors import WordErrors
from finetune.training.command import parse_train_command
from finetune.training.plan.dry_run import dry_run

Check = Callable[[Command, MonkeyPatch], None]
SBATCH_OPTIONS = ("array", "export", "gpus-per-node", "nodes", "time")


def run(*extra: str, replace: dict[str, str] | None = None) -> Check:
    """The command runs with `extra` options at its end and some of its words replaced."""

    def check(command: Command, _monkeypatch: MonkeyPatch) -> None:
        succeed([*((replace or {}).get(word, word) for word in command.words), *extra])

    return check


def run_without(target: str, fake: object) -> Check:
    """The command runs, but for what needs hours, the network or a browser, in whose place stands `fake`."""

    def check(command: Command, monkeypatch: MonkeyPatch) -> None:
        monkeypatch.setattr(target, fake)
        succeed(command.words)

    return check


def run_by_shell(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """The line runs as it is written, with pipes and redirections, and finds something."""
    done = subprocess.run(["bash", "-c", command.source], capture_output=True, text=True)
    assert done.returncode == 0, done
    target = re.search(r"> (\S+)", command.source)
    if target is not None:
        assert Path(target[1]).read_text()
        assert target[1] in _data_of_examples(), f"no configuration in example/ reads {target[1]}"
    elif command.words[0] != "mkdir":
        assert done.stdout.strip()


def run_pocketsphinx(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """The recordings are aligned, or rejected for the scores of synthetic voices: both are its work."""
    for timings in Path("recordings").glob("*.json"):
        words = re.findall(r'\["([^"]+)", \[[^\]]*\], "SPEAKER_(\w+)"\]', timings.read_text())
        for channel, speaker in (("left", "MAIN"), ("right", "USER")):
            text = " ".join(word for word, who in words if who == speaker)
            timings.with_suffix(f".{channel}.txt").write_text(text)
        timings.unlink()
    result = succeed([*command.words, "--workers", "1"], 0, 1)
    assert re.search(r"1 recordings: (1 annotated|0 annotated, 0 skipped .*, 1 rejected)", result.output)


def run_back_from_transformers(command: Command, monkeypatch: MonkeyPatch) -> None:
    """The model is one that the export wrote, of the tiny base model."""
    export = ["python", "-m", "finetune.export", "--checkpoint", "demo_assets/model"]
    succeed(
        [*export, "--format", "transformers", "--out", command.words[command.words.index("--checkpoint") + 1]]
    )
    run(replace={"kyutai/moshiko-pytorch-bf16": "demo_assets/model"})(command, monkeypatch)


def run_trajectories_of_a_recording(command: Command, monkeypatch: MonkeyPatch) -> None:
    """The file is one that the evaluation of a recording wrote."""
    options = ["--checkpoint", "runs/first", "--data", "librilight/small", "--compare", "--trajectories"]
    succeed(["python", "evaluate.py", "long-context", *options])
    (file,) = Path().glob(command.words[-1])  # a shell would do it
    run(replace={command.words[-1]: str(file)})(command, monkeypatch)


def check_training(command: Command, monkeypatch: MonkeyPatch) -> None:
    """`train.py`: parsed, has what a training needs, and is built without weights or a memory estimate."""
    _check_train_arguments(command.words[2:], monkeypatch)


def check_training_options(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """`train.py` with files that another command makes in a minute: parsed."""
    parse_train_command(command.words[2:])


def check_measurement_options(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """`evaluate.py` with a model that the workspace has none of: parsed."""
    prepare_measurement(command.words[2:])


def check_torchrun(command: Command, monkeypatch: MonkeyPatch) -> None:
    """Parse by torchrun's own parser what is its part, by train.py's the rest."""
    options = get_args_parser().parse_args(command.words[1:])
    assert options.module and (ROOT / f"{options.training_script}.py").is_file()
    assert options.training_script == "train"
    _check_train_arguments(options.training_script_args, monkeypatch)


def check_sbatch(command: Command, monkeypatch: MonkeyPatch) -> None:
    """The script is there, reads the variables that it is given, and their values are accepted."""
    *options, script = command.words[1:]
    text = (ROOT / script).read_text()
    names = [option.partition("=")[0] for option in options]
    assert set(names) <= {f"--{name}" for name in SBATCH_OPTIONS}
    exported = dict(zip(names, options, strict=True))["--export"].partition("=")[2]
    first, *pairs = exported.split(",")
    assert first == "ALL"
    variables = dict(pair.split("=", 1) for pair in pairs)
    for name in variables:
        assert f"${{{name}:-" in text, f"{script} does not read {name}"
    more = variables.get("ARGS", "").split()
    if "YAML" in variables:
        _check_train_arguments([variables["YAML"], "--resume", "auto", *more], monkeypatch)
    else:
        succeed(["python", "annotate.py", variables["SOURCE"], "--shard", "1/1", *more])


def check_recall(command: Command, monkeypatch: MonkeyPatch) -> None:
    """All plans of the experiment are made; training them takes hours."""
    planned = []

    def train_nothing(_folder: Path, plan: Plan, _schedule: Schedule, *, seed: int) -> argparse.Namespace:
        planned.append((plan.label, seed))
        return argparse.Namespace(loss=0.0, problem=None)

    monkeypatch.setattr("experiments.recall.runs.run_arm", train_nothing)
    monkeypatch.setattr("experiments.recall.report.write_report", lambda *_: [])
    succeed(command.words)
    assert len(set(planned)) == len(planned) >= 3


def check_fine_tuning(command: Command, monkeypatch: MonkeyPatch) -> None:
    """All runs of the study are planned; training them takes hours."""
    planned = []

    def train_nothing(
        _folder: Path, plan: FineTuningPlan, *, seed: int, **_options: object
    ) -> dict[str, float]:
        planned.append((plan.arm.label, seed))
        return {"loss": 0.0}

    monkeypatch.setattr("experiments.fine_tuning.runs.run", train_nothing)
    monkeypatch.setattr("experiments.fine_tuning.report.write_report", lambda *_: [])
    succeed(command.words)
    assert len(set(planned)) == len(planned) >= 3


def check_steps(command: Command, monkeypatch: MonkeyPatch) -> None:
    """Every step of an experiment would be accepted; nothing is made, trained or measured."""
    runs, trained, run = f"{command.words[2]}.runs", [], []

    def train_nothing(config: str, run_dir: Path, changes: Mapping[str, object]) -> int:
        keys = (part for key, value in changes.items() if value for part in (f"--{key}", str(value)))
        parse_train_command(["--config", f"example/{config}", "--run_dir", str(run_dir), *keys])
        trained.append(run_dir)
        return 0

    def run_nothing(first: str, *arguments: object) -> int:
        if first == "evaluate.py":
            evaluation._prepare([str(argument) for argument in arguments])
        run.append(first)
        return 0

    for making in ("make_recall_assets", "make_once"):
        monkeypatch.setattr(f"{runs}.{making}", lambda *_, **__: MagicMock(), raising=False)
    monkeypatch.setattr(f"{runs}.train_once", train_nothing)
    monkeypatch.setattr(f"{runs}.run_python", run_nothing)
    monkeypatch.setattr(f"{command.words[2]}.report.write_report", lambda *_: [])
    succeed([*command.words, "--seeds", "1"])
    assert len(set(trained)) == len(trained) >= 3 and run.count("evaluate.py") >= 2


def check_gallery(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """`experiments.failures` parses and has the cases; each is trained by a test of its own."""
    assert set(failures.parse(command.words[3:]).cases) <= CASES.keys()


def check_comparison(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """`experiments.compare_lr` parses; a short comparison is made by a test of its own."""
    compare_lr.parse(command.words[3:])


def check_make(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """The Makefile has the target."""
    subprocess.run(["make", "--dry-run", *command.words[1:]], cwd=ROOT, check=True, capture_output=True)


def check_pip(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """The package is this repository's, with extras that it has."""
    name, _, extras = command.words[-1].rstrip("]").partition("[")
    project = (ROOT / "pyproject.toml").read_text()
    assert name == "." or f'name = "{name}"' in project
    optional = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for extra in filter(None, extras.split(",")):
        assert re.search(rf"^{extra} = \[", optional, re.MULTILINE), extra


def check_apt(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """The packages are those that the demo reads."""
    assert tuple(command.words[2:]) in map(prompt_packages, LANGUAGES)


def check_hub_download(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """The options are those of huggingface-cli."""
    parser = argparse.ArgumentParser()
    DownloadCommand.register_subcommand(parser.add_subparsers())
    parser.parse_args(command.words[1:])


def check_tensorboard(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """Its parser accepts the line, and there are curves in the folder."""
    board = TensorBoard()
    board.configure(argv=list(command.words))
    assert list(Path(board.flags.logdir).rglob("events.out.tfevents.*"))


def check_debian_prompts(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """Without the packages of the network, the command ends with what to download."""
    shutil.rmtree("debian_prompts", ignore_errors=True)
    errors = succeed(command.words, 2).errors
    language = command.words[command.words.index("--language") + 1] if "--language" in command.words else "en"
    assert f"apt-get download {' '.join(prompt_packages(language))}" in errors


def check_human_dialogues(command: Command, monkeypatch: MonkeyPatch) -> None:
    """Without the packages and what downloads them, the command ends with their names."""
    monkeypatch.setattr("finetune.demo.debian.fetch.shutil.which", lambda _name: None)
    errors = succeed(command.words, 2).errors
    assert all(name in errors for name in SOURCES[command.words[3]].packages)


def check_demo_memory(command: Command, monkeypatch: MonkeyPatch) -> None:
    """Without its minutes of training: the dialogues are made and train.py would be started three times."""
    started = []
    monkeypatch.setattr("finetune.demo.memory.command.train", lambda *each: started.append(each) or 0)
    monkeypatch.setattr("finetune.demo.memory.command._compare", lambda *_: None)
    succeed([*command.words, "--num-train", "2", "--num-eval", "2"])
    for config, changes in started:
        keys = (part for key, value in changes.items() if value for part in (f"--{key}", str(value)))
        parse_train_command(["--config", f"example/{config}", *keys])
    assert len(started) == 3


def check_module_is_there(command: Command, _monkeypatch: MonkeyPatch) -> None:
    """Somebody else's module is installed; running it needs a microphone."""
    assert importlib.util.find_spec(command.words[2]) is not None


def check_whisper(command: Command, monkeypatch: MonkeyPatch) -> None:
    """Whisper needs a GPU and its weights: all up to the engine, for recordings without word timings."""
    reached = []
    monkeypatch.setattr(
        annotation, "run_tasks", lambda _prepare, todo, num_workers: reached.extend(todo) or ()
    )
    for timings in Path("recordings").glob("*.json"):
        timings.unlink()
    succeed(command.words)
    assert len(reached) == len(list(Path("recordings").glob("*.wav")))


def check_word_errors(command: Command, monkeypatch: MonkeyPatch) -> None:
    """Nothing is installed for it here: all but the count of the errors and the recogniser."""
    monkeypatch.setattr(duplex, "import_jiwer", lambda: None)
    counted = []
    monkeypatch.setattr(
        wer.WordErrorMeter,
        "count",
        lambda _, _output, *, name: counted.append(name) or WordErrors(1, 0, 0, 0, ""),
    )
    monkeypatch.setattr(duplex, "make_recogniser", lambda *_, **__: "somebody who hears")
    succeed(command.words)
    assert len(counted) == 4


def file_is_in_the_repository(name: str) -> Check:
    """A file that the command reads is in the repository."""

    def check(_command: Command, _monkeypatch: MonkeyPatch) -> None:
        assert (ROOT / name).is_file()

    return check


def nothing_to_check(_command: Command, _monkeypatch: MonkeyPatch) -> None:
    """A command that says nothing about this repository."""


def _check_train_arguments(arguments: Sequence[str], monkeypatch: MonkeyPatch) -> None:
    command = parse_train_command(arguments)
    if not command.dry_run:
        assert command.args.run_dir, "run_dir is not set"
        assert command.args.data.train_data, "data.train_data is not set"
    monkeypatch.setattr("finetune.training.plan.dry_run.memory_lines", lambda *_, **__: ([], True))
    assert dry_run(command.args, num_gpus=command.num_gpus, gpu_memory_gb=command.gpu_memory_gb) == 0


def _data_of_examples() -> set[str]:
    """The manifests that the configurations in example/ name."""
    paths = [os.path.join("example", name) for name in os.listdir("example")]
    data = [load_train_args(path).data for path in paths]
    return {name for section in data for name in (section.train_data, section.eval_data)}
