"""Files inside Debian packages, read with Debian's own tool and without unpacking them onto the disk."""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import UserError

_AR_MAGIC = b"!<arch>\n"
_MAX_BYTES = 1 << 28  # of all files of a package; those of the prompts have some 10 MB


def read_package(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the plain files in a `.deb`; names begin at the root, without `/` or `./`.

    Links are left out, and so are sparse files, which may claim any size.

    Raises:
        UserError: the file is missing or damaged, no Debian package or too large, or there is no `dpkg-deb`.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_archive(path))) as archive:
            for member in archive:
                if member.isfile() and not member.issparse():
                    content = archive.extractfile(member)
                    assert content is not None  # None for what is no file
                    yield member.name.removeprefix("./"), content.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: is damaged ({error}); download it again.") from error


def _data_archive(path: Path) -> bytes:
    """The files of a package as a tar archive."""
    with path.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise UserError(f"{path}: is no Debian package.")
    tool = shutil.which("dpkg-deb")
    if tool is None:
        raise UserError("dpkg-deb, which reads Debian's packages, is not here; install dpkg.")
    # Absolute: no name of a file begins like an option.
    command = [tool, "--fsys-tarfile", str(path.absolute())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        data = process.stdout.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            process.kill()
            raise UserError(f"{path}: its files have more than {_MAX_BYTES >> 20} MiB; take Debian's own.")
        errors = process.communicate()[1].decode(errors="replace").splitlines()
    if process.returncode != 0:
        reason = errors[0] if errors else f"dpkg-deb ended with status {process.returncode}"
        raise UserError(f"{path}: is damaged ({reason}); download it again.")
    return data
