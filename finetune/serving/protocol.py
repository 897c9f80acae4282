"""The messages of Moshi's websocket: binary, the first byte is the kind.

Kinds 0 to 2 are those of `moshi.server`. Metadata goes only to clients that ask for it (`?memory=1`).
"""

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any


class MessageKind(IntEnum):
    """First byte of a message."""

    HANDSHAKE = 0  # server: the conversation has begun
    AUDIO = 1  # both: the next bytes of an Ogg-Opus stream, 24 kHz mono
    TEXT = 2  # server: UTF-8
    CONTROL = 3  # client: of Moshi's Rust server, has no effect here
    METADATA = 4  # JSON; from a client without effect
    ERROR = 5  # server: UTF-8, for the user
    PING = 6  # client: has no effect here


IGNORED_KINDS = frozenset(
    (MessageKind.HANDSHAKE, MessageKind.TEXT, MessageKind.CONTROL, MessageKind.METADATA, MessageKind.PING)
)


class CloseCode(IntEnum):
    """Why a websocket is closed (RFC 6455, section 7.4, and the IANA registry)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    INVALID_DATA = 1007
    POLICY = 1008
    INTERNAL_ERROR = 1011
    BUSY = 1013


def message(kind: MessageKind, payload: bytes = b"") -> bytes:
    """A binary message."""
    return bytes([kind]) + payload


def metadata(values: Mapping[str, Any]) -> bytes:
    """A metadata message."""
    return message(MessageKind.METADATA, json.dumps(values).encode())
