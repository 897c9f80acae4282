"""What an Ogg-Opus file says about its length, and what its packets last, without decoding it."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from finetune.data.audio.checks import AudioHeader, contradiction, truncated_error
from finetune.errors import DataError

OPUS_SAMPLE_RATE = 48000
_PAGE_HEAD = 27
_LARGEST_PAGE = 65_307
_LONGEST_PACKET = 5760  # 120 ms


class _Page(NamedTuple):
    continues: bool  # its first packet began in the page before
    packets: list[bytes]  # the first bytes of each


def read_opus_header(path: Path) -> AudioHeader:
    """Channels from the first page, length from the last one; raises DataError where there is none."""
    with open(path, "rb") as file:
        start = file.read(4096)
        file.seek(max(0, path.stat().st_size - _LARGEST_PAGE - 229))
        end = file.read()
    page = end.rfind(b"OggS")
    head = start.find(b"OpusHead")
    if page < 0 or len(end) < page + 14 or len(start) < head + 19:
        raise _unreadable(path)
    num_samples = int.from_bytes(end[page + 6 : page + 14], "little", signed=True)
    return AudioHeader(start[head + 9], OPUS_SAMPLE_RATE, max(0, num_samples))


def check_opus_length(path: Path, header: AudioHeader) -> None:
    """Add up what all packets last, of all streams in a row, before a decoder makes room for it.

    Raises:
        DataError: it is another length than the last page's, or the file cannot be taken apart.
    """
    total = last_page = 0
    for page in _pages(path):
        last_page = sum(
            _num_samples(packet)
            for packet in page.packets[page.continues :]
            if packet not in (b"OpusHead", b"OpusTags")
        )
        total += last_page
    if total < header.num_samples:
        raise truncated_error(path, claimed=header.num_samples, held=total)
    # The end of the last page may be cut off, of which the decoder does not know.
    if total - last_page > header.num_samples + _LONGEST_PACKET:
        raise contradiction(path, header, total)


def _pages(path: Path) -> Iterator[_Page]:
    with open(path, "rb") as file:
        while head := file.read(_PAGE_HEAD):
            table = file.read(head[26]) if len(head) == _PAGE_HEAD and head.startswith(b"OggS") else b""
            if not head.startswith(b"OggS") or len(head) < _PAGE_HEAD or len(table) < head[26]:
                raise _unreadable(path)
            yield _Page(bool(head[5] & 1), _packets(path, file, table))


def _packets(path: Path, file: BinaryIO, table: bytes) -> list[bytes]:
    body = file.read(sum(table))
    if len(body) < sum(table):
        raise _unreadable(path)
    packets, start, size = [], 0, 0
    for segment in table:
        size += segment
        if segment < 255:
            packets.append(body[start : start + min(size, 8)])
            start, size = start + size, 0
    if size:
        packets.append(body[start : start + 8])
    return packets


def _num_samples(packet: bytes) -> int:
    """What a packet lasts at 48 kHz, by its first two bytes (RFC 6716, section 3.1)."""
    if not packet:
        return 0
    kind, code = packet[0] >> 3, packet[0] & 3
    if kind < 12:
        frame = (480, 960, 1920, 2880)[kind & 3]
    elif kind < 16:
        frame = (480, 960)[kind & 1]
    else:
        frame = (120, 240, 480, 960)[kind & 3]
    count = (1, 2, 2)[code] if code < 3 else packet[1] & 0x3F if len(packet) > 1 else 0
    return min(count * frame, _LONGEST_PACKET)


def _unreadable(path: Path) -> DataError:
    return DataError(f"{path}: cannot be read as Ogg-Opus; is it complete?")
