"""Where connections come in: how many there may be, of one address and in all, and for how long."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from errno import EADDRNOTAVAIL, EAFNOSUPPORT
from ipaddress import ip_address

from aiohttp import web

from finetune.serving.connection import Connection, Phase
from finetune.serving.limits import ConnectionLimits
from finetune.serving.server_log import RequestLog

logger = logging.getLogger(__name__)

_BACKLOG = 128
_ACCEPTED_AT_ONCE = 32
_SEC_BETWEEN_LOOKS = 0.5
_SEC_AFTER_FAILED_ACCEPT = 1.0
_OTHER_DESCRIPTORS = 64  # for files, and for connections that are being closed


class Door:
    """Accepts connections and ends those that dawdle.

    Over a limit, the connection that has been silent for longest makes room; where none is silent, the new
    one is closed. Whoever talks is never put out.

    Args:
        make_handler: makes aiohttp's protocol of a connection.
        limits: of connections.
        ssl_context: where the server speaks https.
    """

    def __init__(
        self,
        make_handler: Callable[[], asyncio.Protocol],
        limits: ConnectionLimits,
        *,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._make_handler = make_handler
        self._limits = limits
        self._ssl_context = ssl_context
        self._max_connections = limits.in_all
        self._listening: list[socket.socket] = []
        self._connections: dict[Connection, None] = {}  # the oldest first
        self._arrivals: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """That it listens on."""
        return int(self._listening[0].getsockname()[1])

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    async def open(self, host: str, port: int) -> None:
        """Listen on every address of a host.

        Args:
            host: name or address.
            port: 0 takes a free one.

        Raises:
            OSError: none can be listened on, or one is taken.
            ValueError: no name or port.
        """
        self._max_connections = min(self._limits.in_all, _room_for_connections())
        if self._max_connections < self._limits.in_all:
            logger.warning(
                "room for %d connections instead of %d: the limit of open files is too low (ulimit -n)",
                self._max_connections,
                self._limits.in_all,
            )
        self._listening = await _listen(host, port)
        for listening in self._listening:
            self._accept_from(listening)
        self._watch = asyncio.create_task(self._look_after())

    async def close(self) -> None:
        """Listen no more; open connections stay, aiohttp ends them."""
        loop = asyncio.get_running_loop()
        for listening in self._listening:
            loop.remove_reader(listening)
            listening.close()
        self._listening = []
        for arrival in list(self._arrivals):
            arrival.cancel()
        if self._watch is not None:
            self._watch.cancel()

    def _accept_from(self, listening: socket.socket) -> None:
        if listening in self._listening:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptors or no memory: the connection stays in the queue, so try again later.
                logger.warning("cannot accept a connection: %s", error.strerror)
                loop.remove_reader(listening)
                loop.call_later(_SEC_AFTER_FAILED_ACCEPT, self._accept_from, listening)
                return
            crowd = _crowd_of(address[0])
            if not self._make_room(crowd):
                logger.warning("no room for a connection from %s", address[0])
                accepted.close()
                continue
            accepted.setblocking(False)
            connection = Connection(
                accepted,
                crowd,
                make_handler=self._make_handler,
                limits=self._limits,
                on_end=lambda connection: self._connections.pop(connection, None),
            )
            self._connections[connection] = None
            arrival = asyncio.create_task(self._let_in(connection, accepted))
            self._arrivals.add(arrival)
            arrival.add_done_callback(self._arrivals.discard)

    def _make_room(self, crowd: bytes) -> bool:
        rivals = [connection for connection in self._connections if connection.crowd == crowd]
        if len(rivals) < self._limits.per_address:
            if len(self._connections) < self._max_connections:
                return True
            rivals = list(self._connections)
        silent = next((connection for connection in rivals if connection.phase is Phase.SILENT), None)
        if silent is not None:
            silent.drop()
        return silent is not None

    async def _let_in(self, connection: Connection, accepted: socket.socket) -> None:
        context = self._ssl_context
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=context,
                ssl_handshake_timeout=None if context is None else self._limits.request_sec,
            )
        except OSError as error:  # a handshake that fails
            logger.debug("connection not made: %s", error)
            connection.drop()
        except asyncio.CancelledError:
            connection.drop()
            raise

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(_SEC_BETWEEN_LOOKS)
            now = time.monotonic()
            for connection in list(self._connections):
                reason = connection.overdue(now)
                if reason is not None:
                    logger.debug("connection ended: %s", reason)
                    connection.drop()


@contextlib.asynccontextmanager
async def serving(
    app: web.Application,
    host: str,
    port: int,
    *,
    limits: ConnectionLimits | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[Door]:
    """Context in which an application is served; at its end the application says goodbye to its callers.

    Args:
        app: whose responses close their connections, see `Server.application`.
        host: name or address.
        port: 0 takes a free one.
        limits: of connections.
        ssl_context: to speak https.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: no name or port.
    """
    limits = limits or ConnectionLimits()
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=5.0,
        lingering_time=limits.linger_sec,
        auto_decompress=False,
        logger=RequestLog(logger),
    )
    try:
        await runner.setup()
        assert runner.server is not None
        door = Door(runner.server, limits, ssl_context=ssl_context)
        try:
            await door.open(host, port)
            yield door
        finally:
            await door.close()
    finally:
        await runner.cleanup()


async def _listen(host: str, port: int) -> list[socket.socket]:
    infos = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listening: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as undo:
        for family, address in dict.fromkeys((info[0], info[4][0]) for info in infos):
            try:
                opened = socket.create_server((address, port), family=family, backlog=_BACKLOG)
            except OSError as error:
                if error.errno not in (EADDRNOTAVAIL, EAFNOSUPPORT):
                    raise
                missing = error  # localhost may have an IPv6 address where the machine has none
                continue
            undo.callback(opened.close)
            opened.setblocking(False)
            listening.append(opened)
            port = opened.getsockname()[1]  # of the first, where any would do
        if not listening:
            raise missing or OSError("the host has no address")
        undo.pop_all()
    return listening


def _crowd_of(address: str) -> bytes:
    """What connections of one address are counted under: with IPv6, whoever has one has 2^64 of them."""
    packed = ip_address(address.partition("%")[0]).packed
    return packed[:8] if len(packed) == 16 else packed


def _room_for_connections() -> int:
    """Descriptors that this process may still open, less some for other things."""
    try:
        import resource  # not on Windows

        num_open = len(os.listdir("/dev/fd"))
    except (ImportError, OSError):
        return 2**31
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = soft - num_open - _OTHER_DESCRIPTORS
    return 2**31 if soft == resource.RLIM_INFINITY else max(room, 1)
