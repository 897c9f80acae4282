"""Fetches packages with apt, from the mirror that the system is set up for, into a folder; no root needed."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import UserError, one_line
from finetune.files import new_folder


def find_package(folder: Path, name: str) -> Path | None:
    """The `.deb` of a package in a folder; None where there is none.

    Raises:
        UserError: there are several versions.
    """
    found = sorted(folder.glob(f"{name}_*.deb"))
    if len(found) > 1:
        raise UserError(f"{folder}: holds {len(found)} versions of {name}; keep one.")
    return found[0] if found else None


def fetch_packages(folder: Path, names: Sequence[str]) -> list[Path]:
    """The `.deb` files of packages, of which those that the folder does not hold are downloaded.

    A download that is broken off leaves nothing under the package's name.

    Args:
        folder: is made where it is missing.
        names: of packages.

    Raises:
        UserError: there is no apt, no such package or no network, or the folder holds several versions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if find_package(folder, name) is None]
    if missing:
        _download(folder, missing)
    return [_there(folder, name) for name in names]


def _there(folder: Path, name: str) -> Path:
    path = find_package(folder, name)
    if path is None:
        raise UserError(f"{folder}: apt-get brought no {name}_*.deb.")
    return path


def _download(folder: Path, names: Sequence[str]) -> None:
    wanted = " ".join(names)
    tool = shutil.which("apt-get")
    if tool is None:
        raise UserError(
            f"apt-get, which downloads packages, is not here; put {wanted} (.deb files of "
            f"packages.debian.org) into {folder}."
        )
    download = folder / "download"
    shutil.rmtree(download, ignore_errors=True)
    with new_folder(download) as partial:
        result = subprocess.run(
            [tool, "-q", "download", *names], cwd=partial, capture_output=True, text=True, errors="replace"
        )
        if result.returncode != 0:
            errors = [line[2:].strip() for line in result.stderr.splitlines() if line.startswith("E:")]
            reason = one_line(errors[0] if errors else f"exit status {result.returncode}").rstrip(".")
            raise UserError(
                f"apt-get cannot download {wanted} ({reason}); try again after apt-get update, or put the "
                f".deb files into {folder}."
            )
    for path in download.glob("*.deb"):
        path.rename(folder / path.name)
    shutil.rmtree(download)
