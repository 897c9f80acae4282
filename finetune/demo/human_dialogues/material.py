"""What a source gives: conversations of two speakers as recorded lines with their texts."""

from typing import NamedTuple


class Line(NamedTuple):
    """One recorded utterance.

    Attributes:
        name: of the recording, for messages.
        by_first: whether the first of the two speakers says it.
        text: what is said.
        sound: the file with the recording.
        file_format: FFmpeg's name of its format, for a file that does not say itself what it is.
    """

    name: str
    by_first: bool
    text: str
    sound: bytes
    file_format: str | None = None


class Conversation(NamedTuple):
    """Lines in the order of the script, under a name that is a file's name, too."""

    name: str
    lines: list[Line]


class Material(NamedTuple):
    """All that is taken from a source's packages.

    Attributes:
        conversations: in order of their names.
        speakers: names of the first and the second speaker.
        english: whether the words can be aligned.
        left_out: what was recorded but not taken: reason and number of recordings.
        notices: names and texts of the packages' licences and notices.
    """

    conversations: list[Conversation]
    speakers: tuple[str, str]
    english: bool
    left_out: dict[str, int]
    notices: dict[str, str]
