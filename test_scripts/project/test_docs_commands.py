"""Every command and every block of the documentation is run, or checked as far as this machine allows."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ruamel.yaml import YAML

import docs_checks as checks
from docs_checks import Check, run
from docs_commands import PAGES, ROOT, blocks_of, distinct_commands, read_blocks
from docs_workspace import DEMO_SIZES, RUN_SIZES, copy_workspace, make_workspace
from finetune.args import TrainArgs
from finetune.config_io import build_args

# Modules run a second time here, in this process.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
COMMANDS = distinct_commands()
LANGUAGES = {"", "bash", "json", "math", "python", "yaml"}
TINY_BASE = {
    "kyutai/moshiko-pytorch-bf16": "demo_assets/model",
    "example/moshi_7B_ttt.yaml": "example/quickstart.yaml",
}


class Rule(NamedTuple):
    """A class of commands.

    Attributes:
        kind: `run`: for real, on tiny files; `checked`: it needs Moshi 7B, a GPU, Slurm, the network, a
            browser or hours, so all but that is done; `shell`: a program that is not ours.
        pattern: of the whole command.
        check: raises where such a command would not work.
    """

    kind: str
    pattern: str
    check: Check


async def serve_nobody(*_) -> None:
    """Stands in the place of listening."""


class FakeHub:
    """Stands in the place of the Hugging Face Hub."""

    def create_repo(self, repo_id, **_):
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, folder_path, **_):
        assert {"README.md", "training.json"} <= {path.name for path in Path(folder_path).iterdir()}


RULES = [
    Rule("run", r"python -m finetune\.demo", run("--out", "again", *DEMO_SIZES)),
    Rule("run", r"python train\.py --config example/(quickstart|debian_prompts)\.yaml", run(*RUN_SIZES)),
    Rule("run", r"python train\.py --config config\.yaml", run(*RUN_SIZES, "--run_dir", "runs/new")),
    Rule("run", r"python train\.py --config config\.yaml --resume auto", run(*RUN_SIZES, "--max_steps", "3")),
    Rule("run", r"python train\.py --resume runs/\w+", run("--max_steps", "3")),
    Rule(
        "run",
        r"python train\.py --resume runs/\w+/checkpoints/\S+ --run_dir \S+",
        run(replace={"runs/first/checkpoints/checkpoint_000400": "runs/first/checkpoints/checkpoint_000001"}),
    ),
    Rule("run", r"python -m finetune\.data\.check .*", run()),
    Rule("run", r"python -m finetune\.data\.manifest .*", run("--overwrite")),
    Rule("run", r"python -m finetune\.data\.encode .*", run("--devices", "cpu", replace=TINY_BASE)),
    Rule("run", r"python -m finetune\.diagnose .*", run()),
    Rule("run", r"python -m finetune\.memory .*", run()),
    Rule("run", r"python -m finetune\.data\.convert .*", run()),
    Rule("run", r"python -m finetune\.export (?!.*--push-to-hub)(?!.*--format kyutai).*", run()),
    Rule("run", r"python -m finetune\.export .* --format kyutai .*", checks.run_back_from_transformers),
    Rule("run", r"python -m finetune\.extend .*", run(replace=TINY_BASE)),
    Rule("run", r"python generate\.py .*", run()),
    Rule("run", r"python evaluate\.py recall .*", run("--lags", "1")),
    Rule("run", r"python evaluate\.py (?!trajectories)(?!recall)(?!transcription)(?!.* --wer ).*", run()),
    Rule("checked", r"python evaluate\.py transcription .*", checks.check_measurement_options),
    Rule("checked", r"python evaluate\.py duplex .* --wer \w+", checks.check_word_errors),
    Rule("run", r"python evaluate\.py trajectories runs/\w+", run()),
    Rule(
        "run",
        r"python evaluate\.py trajectories \S+\.safetensors",
        checks.run_trajectories_of_a_recording,
    ),
    Rule("run", r"python annotate\.py .* --engine pocketsphinx .*", checks.run_pocketsphinx),
    Rule("checked", r"python annotate\.py recordings/", checks.check_whisper),
    Rule(
        "checked",
        r"python train\.py --config example/(moshi_7B\w*\.yaml .*|\w+\.yaml --dry-run)",
        checks.check_training,
    ),
    Rule("checked", r"python train\.py --config example/recall\w*\.yaml.*", checks.check_training_options),
    Rule("checked", r"torchrun .*", checks.check_torchrun),
    Rule("checked", r"sbatch .*", checks.check_sbatch),
    Rule(
        "checked", r"python serve\.py .*", checks.run_without("finetune.serving.command._run", serve_nobody)
    ),
    Rule(
        "checked",
        r"python -m finetune\.export .* --push-to-hub \S+",
        checks.run_without("finetune.export.folder.HfApi", FakeHub),
    ),
    Rule("checked", r"python -m experiments\.recall \S+", checks.check_recall),
    Rule("checked", r"python -m experiments\.fine_tuning \S+", checks.check_fine_tuning),
    Rule("checked", r"python -m experiments\.(planted|human_speech)( .*)?", checks.check_steps),
    Rule("checked", r"python -m experiments\.failures .*", checks.check_gallery),
    Rule("checked", r"python -m experiments\.compare_lr .*", checks.check_comparison),
    Rule(
        "checked",
        r"python -m benchmarks( .*)?",
        checks.run_without("benchmarks.report.make_report", lambda *_: ""),
    ),
    Rule("checked", r"python -m finetune\.demo\.memory( .*)?", checks.check_demo_memory),
    Rule(
        "run",
        r"python -m finetune\.demo\.recall",
        run("--out", "again", "--num-items", "8", "--num-train", "2"),
    ),
    Rule("checked", r"python -m finetune\.demo\.debian_prompts .*", checks.check_debian_prompts),
    Rule("checked", r"python -m finetune\.demo\.human_dialogues .*", checks.check_human_dialogues),
    Rule("checked", r"python -m moshi\.client", checks.check_module_is_there),
    Rule("checked", r"huggingface-cli download .*", checks.check_hub_download),
    Rule("checked", r"apt-get download .*", checks.check_apt),
    Rule("checked", r"tensorboard .*", checks.check_tensorboard),
    Rule("shell", r"(grep|head|ls|mkdir|sed|tail) .*", checks.run_by_shell),
    Rule("shell", r"make [\w-]+", checks.check_make),
    Rule("shell", r"pip install .*", checks.check_pip),
    Rule("shell", r"pre-commit install", checks.file_is_in_the_repository(".pre-commit-config.yaml")),
    Rule("shell", r"git clone|cd moshi-ttt|source \.venv/bin/activate", checks.nothing_to_check),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("docs") / "workspace")


@pytest.fixture
def inside(workspace, tmp_path, monkeypatch):
    """The present folder is a workspace of this test's own."""
    monkeypatch.chdir(copy_workspace(workspace, tmp_path / "workspace"))
    return Path.cwd()


def matching_rules(command) -> list[Rule]:
    """The classes of a command."""
    return [rule for rule in RULES if re.fullmatch(rule.pattern, command.text)]


def test_every_command_is_of_exactly_one_class():
    wrong = [
        f"{', '.join(command.places)}: {command.text}: {len(matching_rules(command))} classes"
        for command in COMMANDS
        if len(matching_rules(command)) != 1
    ]
    assert not wrong, "\n".join(wrong)


def test_every_class_has_a_command():
    used = {rule.pattern for command in COMMANDS for rule in matching_rules(command)}
    assert [rule.pattern for rule in RULES if rule.pattern not in used] == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.places[0])
def test_a_documented_command_works(command, inside, monkeypatch):
    threads = torch.get_num_threads()
    try:
        for rule in matching_rules(command):
            rule.check(command, monkeypatch)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{', '.join(command.places)}: {command.text}: {error}") from error
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_in_a_language_that_is_checked(page):
    for block in read_blocks(page):
        assert block.language in LANGUAGES, f"{block.page}:{block.line}"


@pytest.mark.parametrize("block", blocks_of("json"), ids=lambda block: f"{block.page}:{block.line}")
def test_json_blocks_parse(block):
    assert isinstance(json.loads(block.text), dict)


@pytest.mark.parametrize("block", blocks_of("yaml"), ids=lambda block: f"{block.page}:{block.line}")
def test_yaml_blocks_are_parts_of_a_configuration(block):
    build_args(TrainArgs, YAML(typ="safe", pure=True).load(block.text))


@pytest.mark.parametrize("block", blocks_of("python"), ids=lambda block: f"{block.page}:{block.line}")
def test_python_blocks_run(block, inside):
    torch.save({"weight": torch.zeros(2)}, "model.pt")
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_that_are_named_in_a_sentence_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for module in re.findall(r"python -m ([a-z][\w.]*\w)", text):
        folder = ROOT / module.replace(".", "/")
        ours = module.split(".")[0] in {"benchmarks", "experiments", "finetune", "site_tools"}
        assert not ours or folder.with_suffix(".py").is_file() or (folder / "__main__.py").is_file(), module
    for script in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
