"""The wheel: what is in it, and that its commands work away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import moshi_ttt

ROOT = Path(__file__).parent.parent
COMMANDS = ["annotate", "evaluate", "generate", "serve", "train"]


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


def start(installed, name, *arguments, cwd):
    """Run a console script of the wheel, away from the repository."""
    program = (
        "import sys; from importlib.metadata import distribution; sys.argv[0] = sys.argv.pop(1); "
        "scripts = distribution('moshi-ttt').entry_points.select(group='console_scripts'); "
        "(script,) = [s for s in scripts if s.name == sys.argv[0]]; "
        "script.load()()"
    )
    env = {**os.environ, "PYTHONPATH": str(installed), "NO_TORCH_COMPILE": "1"}
    command = [sys.executable, "-c", program, f"moshi-ttt-{name}", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


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
def test_the_installed_command_is_the_script_of_the_root(name, installed, tmp_path):
    shown = start(installed, name, "--help", cwd=tmp_path)
    script = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    expected = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    usage, _, options = shown.stdout.partition("\n\n")
    assert usage.startswith(f"usage: moshi-ttt-{name} ")
    assert options == expected.stdout.partition("\n\n")[2]


def test_a_mistake_at_an_installed_command_is_one_line_and_status_2(installed, tmp_path):
    failed = start(installed, "train", "missing.yaml", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: missing.yaml") and failed.stderr.count("\n") == 1
