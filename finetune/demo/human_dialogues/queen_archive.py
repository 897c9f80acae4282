"""The container of Flight of the Amazon Queen, `queen.1c`, and the strings inside its files.

The layout is known from ScummVM's engine for the game (engines/queen/resource.cpp and talk.cpp): big endian;
"QTBL", the version in 6 bytes, 2 bytes, how the sound is compressed, the number of files; of each file its
name in 12 bytes, the number of the volume, offset and size.
"""

import struct

from finetune.errors import UserError

_HEADER = struct.Struct(">4s6s2xBH")
_ENTRY = struct.Struct(">12sBII")
_MAGIC = b"QTBL"
_ENGLISH_WITH_VOICES = b"CEM10"
_FORMATS = {1: "mp3", 2: "ogg", 3: "flac"}
_FILE_HEADER = 20  # bytes that scripts begin with


class Archive:
    """The files of the container.

    Args:
        data: of the container.
        where: its path, for messages.

    Attributes:
        sound_format: FFmpeg's name of the format of the sounds.
        names: of the files, in order.

    Raises:
        UserError: it is damaged or of another version of the game.
    """

    def __init__(self, data: bytes, *, where: str) -> None:
        self._data = data
        self._where = where
        self._entries: dict[str, tuple[int, int]] = {}
        try:
            magic, version, compression, count = _HEADER.unpack_from(data)
            if magic != _MAGIC or not version.startswith(_ENGLISH_WITH_VOICES) or compression not in _FORMATS:
                raise UserError(f"{where}: is not the English version with compressed voices.")
            for index in range(count):
                name, _, offset, size = _ENTRY.unpack_from(data, _HEADER.size + index * _ENTRY.size)
                if offset + size > len(data):
                    raise self.damaged(f"{count} files are announced, and the {index + 1}. is not whole")
                self._entries[name.rstrip(b"\0").decode("ascii")] = (offset, size)
        except (struct.error, UnicodeDecodeError) as error:
            raise self.damaged(str(error)) from error
        self.sound_format = _FORMATS[compression]
        self.names = list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self._entries:
            raise self.damaged(f"it holds no {name}")
        offset, size = self._entries[name]
        return self._data[offset : offset + size]

    def read_script(self, name: str) -> bytes:
        """The content of a script, which every offset inside it counts from.

        Raises:
            UserError: there is none of this name.
        """
        return self.read(name)[_FILE_HEADER:]

    def damaged(self, reason: str) -> UserError:
        """What to raise when something in it cannot be read."""
        return UserError(f"{self._where}: is damaged ({reason}); download the package again.")


def read_numbers(data: bytes, offset: int, count: int) -> tuple[int, ...]:
    """Signed numbers of 16 bits.

    Raises:
        struct.error: the data ends before.
    """
    return struct.unpack_from(f">{count}h", data, offset)


def read_text(data: bytes, offset: int, *, align: int) -> tuple[str, int]:
    """A string that its length precedes, and the offset behind it.

    Args:
        data: the script.
        offset: of the length.
        align: what follows begins at a multiple of this, unless the string is empty.

    Raises:
        struct.error: the data ends before.
    """
    (length,) = struct.unpack_from("B", data, offset)
    (text,) = struct.unpack_from(f"{length}s", data, offset + 1)
    end = offset + 1 + length
    return text.decode("cp437"), -(-end // align) * align if length else end
