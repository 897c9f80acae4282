"""The documentation: builds without a warning, no dead links, no other hosts, in step with the code."""

import re
import subprocess
import sys

import pytest

from finetune.config_io import all_keys
from project_root import ROOT
from site_tools import config_reference
from site_tools.hooks import math_block

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
# What loads a resource, as opposed to a link that somebody may follow.
LOADS = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["'](?:https?:)?//|<link[^>]+stylesheet[^>]*//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder, built.stderr


def test_the_site_builds_without_a_warning(site):
    assert not re.findall(r"^(?:WARNING|ERROR).*", site[1], re.MULTILINE)


def test_every_page_is_in_the_site(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site[0] / f"{page.stem}.html").is_file()


def test_the_site_loads_nothing_from_other_hosts(site):
    pages = list(site[0].rglob("*.html"))
    assert pages
    for page in pages:
        assert not LOADS.findall(page.read_text(encoding="utf-8")), page
    for style in site[0].rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?https?:", style.read_text(encoding="utf-8")), style


def test_equations_are_drawn_without_a_script(site):
    text = (site[0] / "ttt.html").read_text(encoding="utf-8")
    assert text.count("<math") >= 8
    assert "\\frac" not in text


def test_a_block_of_several_equations_becomes_as_many():
    assert math_block("x = 1\n\ny = \\frac{1}{2}").count("<math") == 2


def test_the_architecture_page_shows_every_room_and_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("## The rooms")[2].split("```")[1]
    shown, path = {}, []
    for line in tree.splitlines():
        room = re.match(r"( *)(\w+)/ ", line)
        if room:
            path = [*path[: len(room[1]) // 2], room[2]]
            shown["/".join(path)] = set()
        else:
            shown.setdefault("/".join(path), set()).update(re.findall(r"\w+(?!\w*/)", line))
    for package in ("moshi_ttt", "finetune"):
        for folder in {file.parent for file in (ROOT / package).rglob("*.py")}:
            modules = {file.stem for file in folder.glob("*.py")} - {"__init__", "__main__"}
            assert shown[folder.relative_to(ROOT).as_posix()] - {"page"} == modules - {"page"}, folder


def test_the_configuration_reference_is_in_step_with_the_code():
    written = config_reference.PAGE.read_text(encoding="utf-8")
    assert written == config_reference.render(), "run python -m site_tools.config_reference"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:", target):
            path, _, anchor = target.partition("#")
            file = page if not path else page.parent / path
            assert file.exists(), target
            if anchor:
                assert anchor in _anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_repository_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "example|slurm|docs|finetune|moshi_ttt|benchmarks|experiments|test_scripts|site_tools"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_names_that_replace_those_of_the_original_exist():
    page = (ROOT / "docs" / "original_names.md").read_text(encoding="utf-8")
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("finetune", "moshi_ttt", "test_scripts")
        for path in (ROOT / package).rglob("*.py")
    )
    rows = [line.split(" | ") for line in page.replace("\\|", "").splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    for row in rows:
        there, here = row[0], row[-1]
        for key in re.findall(r"`((?:ttt|optim|eval|data)\.[\w.]+)`", here):
            assert key in {name for name, _ in all_keys()}, key
        stays = here.startswith("the same") or "the same |" in here
        for name in re.findall(r"`(\w{4,})`", there if stays else here):
            assert re.search(rf"\b{name}\b", source), name


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
