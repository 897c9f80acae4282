"""How large a header of a safetensors file may be."""

from pathlib import Path

from moshi_ttt.files.regular_file import regular_only

# The header of Moshi 7B has 50 KB. A file may claim up to 100 MB, which become gigabytes when parsed.
MAX_HEADER_BYTES = 16 * 2**20


def oversized_header(path: Path) -> int | None:
    """The bytes of a header that nothing of ours needs; to be asked before anything parses it.

    Returns:
        None where the header is small enough, or claims more than the file holds, which safetensors refuses.

    Raises:
        OSError: the file cannot be read, or is a pipe or device.
    """
    with open(path, "rb", opener=regular_only) as start:
        num_bytes = int.from_bytes(start.read(8), "little")
    return num_bytes if MAX_HEADER_BYTES < num_bytes <= path.stat().st_size else None
