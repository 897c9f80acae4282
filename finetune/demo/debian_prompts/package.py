"""Files inside Debian packages, read without unpacking them."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import UserError

_AR_MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60


def read_package(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the plain files in a `.deb`; names begin at the root, without `/` or `./`.

    Raises:
        UserError: the file is missing or damaged, or no Debian package.
    """
    try:
        data = _data_archive(path)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                if member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None  # None for what is no file
                    yield member.name.removeprefix("./"), content.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: is damaged ({error}); download it again.") from error


def _data_archive(path: Path) -> bytes:
    """The member `data.tar.*` of the ar archive that a package is."""
    content = path.read_bytes()
    if not content.startswith(_AR_MAGIC):
        raise UserError(f"{path}: is no Debian package.")
    position = len(_AR_MAGIC)
    while position + _HEADER_BYTES <= len(content):
        header = content[position : position + _HEADER_BYTES]
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        start = position + _HEADER_BYTES
        if name.startswith("data.tar"):
            if name.endswith(".zst"):
                raise UserError(f"{path}: is compressed with zstd; take Debian's own package, not another's.")
            return content[start : start + size]
        position = start + size + size % 2
    raise ValueError("no data inside")
