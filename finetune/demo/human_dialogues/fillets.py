"""Fish Fillets NG: the two fish of a puzzle game, spoken by actors in Czech and in Dutch; GPL 2.

The packages `fillets-ng-data-cs` and `fillets-ng-data-nl` hold the sound, `fillets-ng-data` the scripts.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from finetune.demo.debian.package import read_package
from finetune.demo.human_dialogues.lua_dialogs import Dialog, read_dialogs, script_order
from finetune.demo.human_dialogues.material import Conversation, Line, Material
from finetune.errors import UserError

SCRIPTS_PACKAGE = "fillets-ng-data"
SPEAKERS = ("small fish", "big fish")

_FONTS = {"font_small": True, "font_big": False}  # of the first speaker: True
_ROOT = "usr/share/games/fillets-ng/"
# Lines of all rooms: dialogLoad("script/share/bore_", "sound/share/borejokes/")
_SHARED = re.compile(r'dialogLoad\(\s*"(script/share/\w+_)"\s*,\s*"(sound/share/\w+)/"\s*\)')
_DIALOGS = re.compile(r"(?P<prefix>script/\w+/(?:\w+_)?)dialogs_(?P<language>\w+)\.lua")


def fillets_packages(language: str) -> tuple[str, str]:
    """The packages for a language, `cs` or `nl`: sound and scripts."""
    return f"{SCRIPTS_PACKAGE}-{language}", SCRIPTS_PACKAGE


def read_fillets(paths: Sequence[Path], language: str) -> Material:
    """Read the packages.

    Args:
        paths: of the two packages, in the order of `fillets_packages`.
        language: `cs` or `nl`.

    Raises:
        UserError: one is damaged or does not hold what is expected.
    """
    sounds, notices = {}, {}
    for name, content in read_package(paths[0]):
        if name.endswith(f"/{language}/{PurePosixPath(name).name}") and name.endswith(".ogg"):
            sounds[name.removeprefix(_ROOT)] = content
        elif PurePosixPath(name).name == "copyright":
            notices["copyright"] = content.decode("utf-8", errors="replace")
    scripts = {
        name.removeprefix(_ROOT): content.decode("utf-8", errors="replace")
        for name, content in read_package(paths[1])
        if name.endswith(".lua")
    }
    left_out: Counter[str] = Counter()
    conversations = []
    for name, dialogs, code, folder in _rooms(scripts, language):
        recorded = {dialog.name: dialog for dialog in dialogs if _sound(folder, language, dialog) in sounds}
        order = script_order([dialog.name for dialog in dialogs], code)
        lines = []
        for dialog in (recorded[key] for key in order if key in recorded):
            sound = sounds.pop(_sound(folder, language, dialog))
            if dialog.font not in _FONTS:
                left_out["said by somebody else"] += 1
            elif "%" in dialog.text:
                left_out["with a number that is filled in"] += 1
            else:
                lines.append(Line(f"{name}/{dialog.name}", _FONTS[dialog.font], dialog.text, sound))
        if lines:
            conversations.append(Conversation(name, lines))
    if not conversations or not notices:
        raise UserError(f"{paths[0]}: holds no dialogue that {paths[1].name} describes; take other versions.")
    left_out["without a text"] = len(sounds)
    return Material(sorted(conversations), SPEAKERS, False, {k: n for k, n in left_out.items() if n}, notices)


def _sound(folder: str, language: str, dialog: Dialog) -> str:
    return f"{folder}/{language}/{dialog.name}.ogg"


def _rooms(scripts: dict[str, str], language: str) -> list[tuple[str, list[Dialog], str, str]]:
    """Name, lines, code and folder of sound of every room and of what is said in all rooms."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in sorted(scripts):
        if not _DIALOGS.fullmatch(path):
            folders[str(PurePosixPath(path).parent)].append(scripts[path])
    shared = {prefix: folder for script in scripts.values() for prefix, folder in _SHARED.findall(script)}
    texts: dict[str, list[Dialog]] = defaultdict(list)  # by folder of sound
    codes: dict[str, str] = {}
    for path in sorted(scripts):
        match = _DIALOGS.fullmatch(path)
        if match is None or match["language"] != language:
            continue
        parent = str(PurePosixPath(path).parent)
        folder = shared.get(match["prefix"], parent.replace("script/", "sound/", 1))
        texts[folder] += read_dialogs(scripts[path])
        codes[folder] = "\n".join(folders[parent])
    return [(PurePosixPath(folder).name, texts[folder], codes[folder], folder) for folder in sorted(texts)]
