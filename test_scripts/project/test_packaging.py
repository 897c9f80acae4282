"""The wheel: what is in it, and that its commands work away from the repository."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import moshi_ttt
from finetune import console
from finetune.commands import run_command
from finetune.console import COMMANDS
from finetune.training.command import train
from project_root import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")  # a build leaves files behind
    for name in ("finetune", "moshi_ttt"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml", "train.py"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's content, as an installation lays it out; not every environment has pip inside."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def start(installed, *arguments, cwd):
    """Run the console script of the wheel, away from the repository."""
    program = (
        "import sys; from importlib.metadata import distribution; sys.argv[0] = 'moshi-ttt'; "
        "(script,) = distribution('moshi-ttt').entry_points.select(group='console_scripts'); "
        "script.load()()"
    )
    env = {**os.environ, "PYTHONPATH": str(installed), "NO_TORCH_COMPILE": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def shown_by(monkeypatch, capsys, program, call):
    """What a command line started as `program` prints before it exits with status 0."""
    monkeypatch.setattr(sys, "argv", [*program.split(), "--help"])
    with pytest.raises(SystemExit) as end:
        call()
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_version_has_one_source(wheel):
    assert wheel.name.startswith(f"moshi_ttt-{moshi_ttt.__version__}-")
    assert f"## {moshi_ttt.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_wheel_holds_the_packages_with_their_data_and_no_script_of_the_root(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"finetune/py.typed", "moshi_ttt/py.typed", "finetune/serving/page/index.html"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"finetune", "moshi_ttt"}
    modules = {
        f"finetune/{path.relative_to(ROOT / 'finetune')}" for path in (ROOT / "finetune").rglob("*.py")
    }
    assert modules <= set(names)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_word_of_the_command_is_the_command_line_of_the_repository(name, monkeypatch, capsys):
    command = COMMANDS[name]
    shown = shown_by(monkeypatch, capsys, f"moshi-ttt {name}", console.main)
    function = getattr(importlib.import_module(command.module), command.function)
    expected = shown_by(monkeypatch, capsys, command.script, lambda: function(["--help"]))
    usage, _, options = shown.partition("\n\n")
    assert usage.startswith(f"usage: moshi-ttt {name} ")
    assert expected.startswith(f"usage: {command.script} ")
    assert options == expected.partition("\n\n")[2]


def test_every_module_that_python_starts_has_a_word_of_the_command():
    started = {
        f"python -m {'.'.join(path.parent.relative_to(ROOT).parts)}"
        for path in (ROOT / "finetune").rglob("__main__.py")
    }
    assert started and started <= {command.script for command in COMMANDS.values()}


def test_a_subcommand_goes_by_its_whole_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moshi-ttt", "memory", "inspect", "--help"])
    with pytest.raises(SystemExit):
        console.main()
    assert capsys.readouterr().out.startswith("usage: moshi-ttt memory inspect ")


def test_the_help_maps_every_command_and_each_stands_where_it_says(installed, tmp_path):
    shown = start(installed, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for name, command in COMMANDS.items():
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith(f"  {name}  ")]
        assert line.endswith(f"  {command.script}")
        module = command.script.removeprefix("python -m ").replace(".", "/")
        places = [ROOT / command.script, ROOT / f"{module}.py", ROOT / module / "__main__.py"]
        assert any(place.is_file() for place in places)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "moshi-ttt trian: unknown command, did you mean train?"),
        (["xyzzy"], "moshi-ttt xyzzy: unknown command, see moshi-ttt --help."),
        (["data"], "moshi-ttt data: which one? data manifest, data check, data convert, data encode."),
        (
            ["data", "chek"],
            "moshi-ttt data: which one? data manifest, data check, data convert, data encode.",
        ),
    ],
)
def test_a_word_that_is_no_command_is_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moshi-ttt", *arguments])
    with pytest.raises(SystemExit) as end:
        console.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_mistake_at_the_installed_command_is_one_line_and_status_2(installed, tmp_path):
    failed = start(installed, "train", "missing.yaml", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: missing.yaml") and failed.stderr.count("\n") == 1


# Modules and names that Python has on Linux and macOS only.
POSIX_MODULES = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = re.compile(
    r"signal\.(SIG(?!INT|TERM)\w+|alarm|setitimer|pthread_\w+)|os\.(fork|kill|get[eu]*id)\b"
)


def loaded_at_once(node: ast.AST):
    """What runs when a module is imported: not functions, nor what may fail there."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try | ast.If):
            yield child
            yield from loaded_at_once(child)


def test_every_command_can_be_loaded_where_there_is_no_posix():
    """So that it can say in one line where it runs."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "finetune").rglob("*.py"), *(ROOT / "moshi_ttt").rglob("*.py")]:
        for node in loaded_at_once(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_MODULES & set(modules), path
            assert not (isinstance(node, ast.Attribute) and POSIX_NAMES.match(ast.unparse(node))), path


def test_on_windows_the_first_line_says_where_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as end:
        run_command(train)
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (
        "",
        "error: moshi-ttt runs on Linux and macOS; on Windows, use it in WSL 2.\n",
    )
