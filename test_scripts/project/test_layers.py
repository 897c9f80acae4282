"""Who may import whom: the rooms of the project, read from the source, with no import in a circle.

A room is a folder of `finetune/`; a file that lies directly in `finetune/` is a room of its own. `moshi_ttt`,
`benchmarks`, `experiments` and `site_tools` are one room each, the scripts of the root another.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from project_root import ROOT

# room: what it must never import; `training` stands for `finetune.training`
NEVER = {
    "moshi_ttt": ["finetune"],
    "base_model": ["checkpoint", "data", "training"],
    "checkpoint": ["data", "inference", "training"],
    "data": ["training", "evaluation", "inference"],
    "monitoring": ["training"],
    "diagnose": ["training"],
    "inference": ["evaluation", "serving", "training"],
    "evaluation": ["serving", "training"],
    "export": ["training"],
    "extend": ["training"],
    "annotation": ["training"],
    "demo": ["training"],
}
FOUNDATION = [
    "args",
    "config_io",
    "ttt_utils",
    "ttt_integration",
    "errors",
    "files",
    "distributed",
    "sharding",
]
# They lie outside their room, where people of moshi-finetune look for them.
AWAY_FROM_HOME = {
    "finetune.checkpointing": "finetune.checkpoint",
    "finetune.eval": "finetune.training",
    "finetune.data.args": "finetune.args",
    "finetune.evaluation.args": "finetune.args",
    "finetune.training.args": "finetune.args",
}
LARGEST_FOLDER = 18


@cache
def sources() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    folders = ("moshi_ttt", "finetune", "benchmarks", "experiments", "site_tools")
    paths = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


@cache
def imports() -> dict[str, set[str]]:
    """The modules that each module imports, wherever in it, by the longest name that is a module."""
    return {name: imported_by(path.read_text()) - {name} for name, path in sources().items()}


def imported_by(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in sources() else str(node.module) for name in names}
    return found & sources().keys()


def room(module: str) -> str:
    package, *parts = module.split(".")
    if package == "finetune":
        return AWAY_FROM_HOME.get(module, f"finetune.{parts[0]}" if parts else package)
    return package if (ROOT / package).is_dir() else "scripts"


def arrows(graph: Mapping[str, set[str]]) -> Counter[tuple[str, str]]:
    """How often one room imports another."""
    pairs = ((room(name), room(other)) for name, others in graph.items() for other in others)
    return Counter((importer, imported) for importer, imported in pairs if importer != imported)


def floors(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """From the ground up: each stands on lower ones only.

    Raises:
        CycleError: there is a circle; its second argument names it.
    """
    sorter, levels = TopologicalSorter(graph), []
    sorter.prepare()
    while sorter.is_active():
        ready = sorter.get_ready()
        levels.append(sorted(ready))
        sorter.done(*ready)
    return levels


def forbidden(graph: Mapping[str, set[str]]) -> list[str]:
    """Each import that a rule forbids."""
    found = []
    for name, others in graph.items():
        mine = room(name).removeprefix("finetune.")
        for other in others:
            theirs = room(other)
            never = any(theirs in (rule, f"finetune.{rule}") for rule in NEVER.get(mine, []))
            if mine == "moshi_ttt":
                never = other.startswith("finetune")
            if mine in FOUNDATION:
                never |= (ROOT / "finetune" / theirs.removeprefix("finetune.")).is_dir()
            if other.startswith("finetune.") and other.endswith(".command") and theirs != room(name):
                never |= mine not in ("scripts", "console")
            if never:
                found.append(f"{name} imports {other}")
    return sorted(found)


def room_graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = defaultdict(set)
    for importer, imported in arrows(imports()):
        graph[importer].add(imported)
    return graph


def test_no_room_imports_what_it_must_not():
    assert forbidden(imports()) == []


def test_no_file_and_no_room_is_imported_in_a_circle():
    for graph in (imports(), room_graph()):
        assert len(floors(graph)) > 1


def test_no_folder_has_more_files_than_a_reader_can_take_in():
    paths = [*sources().values(), *(ROOT / "test_scripts").rglob("*.py")]
    sizes = Counter(str(path.parent.relative_to(ROOT)) for path in paths)
    assert {folder: size for folder, size in sizes.items() if size > LARGEST_FOLDER} == {}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("moshi_ttt.ops", "from finetune.errors import UserError"),
        ("finetune.data.words", "from finetune.training.optim import build_optimizer"),
        ("finetune.files", "import finetune.monitoring.metrics_file"),
        ("finetune.checkpoint.reading", "def late():\n    from finetune.inference import outputs"),
        ("finetune.evaluation.sources", "from finetune.annotation.command import annotate"),
    ],
)
def test_a_forbidden_import_is_found(module, line):
    graph = imports() | {module: imports()[module] | imported_by(line)}
    (found,) = set(forbidden(graph)) - set(forbidden(imports()))
    assert found.startswith(f"{module} imports finetune")


def test_a_circle_is_found():
    with pytest.raises(CycleError):
        floors(imports() | {"moshi_ttt.config": {"moshi_ttt.ttt_layer"}})


def report() -> None:
    """Print what the rules see: floors of rooms and of files, arrows between rooms."""
    for number, level in enumerate(floors(room_graph())):
        print(f"floor {number:2}: {', '.join(name.removeprefix('finetune.') for name in level)}")
    num_floors, num_arrows = len(floors(imports())), len(arrows(imports()))
    print(f"{len(imports())} modules on {num_floors} floors, {num_arrows} arrows between rooms")


if __name__ == "__main__":
    report()
