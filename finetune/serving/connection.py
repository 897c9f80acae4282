"""One connection between the socket and aiohttp: what is read, and when it has lasted long enough.

aiohttp waits for ever for a first request, unpacks bodies that no route reads, and keeps what a client sends
in advance. Here it sees of each connection one request's head, and behind it the frames of a websocket.
"""

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import cast

from aiohttp import web

from finetune.serving.limits import ConnectionLimits

_END_OF_HEAD = b"\r\n\r\n"
_PIECE = 4096  # bytes of a websocket that are passed on at once


class Phase(Enum):
    """How far a connection has come."""

    SILENT = "no request yet"
    ANSWERING = "a request is being answered"
    WEBSOCKET = "a websocket"


class Connection(asyncio.Protocol):
    """The protocol of one accepted socket, in front of aiohttp's.

    Args:
        accepted: the socket.
        crowd: what its address is counted under.
        make_handler: makes aiohttp's protocol.
        limits: of the connection.
        on_end: called once, when it has ended.
    """

    def __init__(
        self,
        accepted: socket.socket,
        crowd: bytes,
        *,
        make_handler: Callable[[], asyncio.Protocol],
        limits: ConnectionLimits,
        on_end: Callable[["Connection"], None],
    ) -> None:
        self.crowd = crowd
        self.phase = Phase.SILENT
        self._socket = accepted
        self._make_handler = make_handler
        self._limits = limits
        self._on_end = on_end
        self._handler: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self._opened = time.monotonic()
        self._blocked: float | None = None  # since when the client takes nothing
        self._closing: float | None = None  # since when it is being closed
        self._num_bytes = 0  # of the head
        self._end = b""  # of the head so far
        self._kept = b""  # received, not passed on
        self._wanted = False  # whether a websocket's bytes are passed on
        self._bytes_left: int | None = None  # to be passed on at most
        self._num_passed = 0  # bytes since the last message
        self._next: asyncio.Handle | None = None

    def became_websocket(self) -> None:
        """From now on bytes are passed on as they are wanted. Called once aiohttp reads frames."""
        self.phase = Phase.WEBSOCKET
        if len(self._kept) > self._limits.request_bytes:
            self.drop()  # more than is kept, before its handshake was answered
        self.want(False)

    def want(self, wanted: bool, *, at_most: int | None = None) -> None:
        """Let a websocket's bytes through, piece by piece, or hold them back.

        aiohttp makes messages of all that it gets, and takes a hundred bytes for one of none. So it gets
        more when none is left.

        Args:
            wanted: whether aiohttp may have more.
            at_most: bytes that it gets from now on; what comes after them is read and forgotten.
        """
        self._wanted = wanted
        self._num_passed = 0
        if at_most is not None:
            self._bytes_left = at_most
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self._pass_on()

    def overdue(self, now: float) -> str | None:
        """Why the connection must end at this time of `time.monotonic`; None where it may last."""
        limits, transport = self._limits, self._transport
        if self._closing is None and transport is not None and transport.is_closing():
            self._closing = now
        if self._closing is not None and now - self._closing > limits.closing_sec:
            return "does not take the end of what it was sent"
        if self._blocked is not None and now - self._blocked > limits.send_sec:
            return "does not take what it is sent"
        if self.phase is Phase.SILENT and now - self._opened > limits.request_sec:
            return f"no request within {limits.request_sec:g} s"
        if self.phase is Phase.ANSWERING and now - self._opened > limits.answer_sec:
            return f"did not take its answer within {limits.answer_sec:g} s"
        return None

    def drop(self) -> None:
        """End the connection at once, whatever is still to be sent."""
        # The socket itself: a transport that is being closed, or in the middle of a TLS handshake, would
        # wait for its client.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()
        self.ended()

    def ended(self) -> None:
        """Count it no more."""
        on_end, self._on_end = self._on_end, lambda _: None
        on_end(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open and, where the server speaks https, the handshake is done."""
        self._transport = cast(asyncio.Transport, transport)
        self._handler = self._make_handler()
        self._handler.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Pass on what aiohttp should see."""
        assert self._handler is not None
        if self.phase is Phase.WEBSOCKET:
            self._kept += data
            self._pass_on()
        elif self.phase is Phase.ANSWERING:
            self._keep(data)
        else:
            self._read_head(self._handler, data)

    def _read_head(self, handler: asyncio.Protocol, data: bytes) -> None:
        seen = self._end + data
        found = seen.find(_END_OF_HEAD)
        if found >= 0:
            length = found + len(_END_OF_HEAD) - len(self._end)
            self._keep(data[length:])
            data = data[:length]
            self.phase = Phase.ANSWERING
        self._end = seen[-len(_END_OF_HEAD) + 1 :]
        self._num_bytes += len(data)
        if self._num_bytes > self._limits.request_bytes:
            self.drop()
            return
        handler.data_received(data)

    def _keep(self, data: bytes) -> None:
        """The body of a request is for nobody; a websocket's first frames may come this early."""
        self._kept += data[: self._limits.request_bytes + 1 - len(self._kept)]

    def _pass_on(self) -> None:
        """One piece; the next one when whoever waits for a message has seen what is in it."""
        transport, handler = self._transport, self._handler
        if transport is None or handler is None or transport.is_closing():
            return
        if self._wanted and self._kept:
            piece, self._kept = self._kept[:_PIECE], self._kept[_PIECE:]
            if self._bytes_left is not None:
                piece = piece[: self._bytes_left]
                self._bytes_left -= len(piece)
                if not self._bytes_left:
                    self._kept = b""
            self._num_passed += len(piece)
            if self._num_passed > self._limits.message_bytes:
                self.drop()  # pieces of nothing, without an end
                return
            if piece:
                handler.data_received(piece)
            if self._kept and self._next is None:
                self._next = asyncio.get_running_loop().call_soon(self._pass_on_next)
        if not transport.is_closing():
            if self._wanted and not self._kept:
                transport.resume_reading()
            else:
                transport.pause_reading()

    def _pass_on_next(self) -> None:
        self._next = None
        self._pass_on()

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        assert self._handler is not None
        return self._handler.eof_received()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is sent to."""
        assert self._handler is not None
        self._blocked = time.monotonic()
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        """It has read."""
        assert self._handler is not None
        self._blocked = None
        self._handler.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        """The socket is closed."""
        assert self._handler is not None
        self._handler.connection_lost(error)
        self.ended()


def connection_of(request: web.Request) -> Connection:
    """The connection that a request came in by.

    Raises:
        ConnectionResetError: the client has left.
    """
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    connection = transport.get_protocol()
    assert isinstance(connection, Connection), "served past the door"
    return connection
