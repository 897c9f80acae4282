"""Routes of the server: the websocket, its page, its health."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from aiohttp import web

from finetune.serving.access import Access
from finetune.serving.caller_queue import Turns
from finetune.serving.chat import Chat
from finetune.serving.limits import Limits
from finetune.serving.protocol import CloseCode
from finetune.serving.voice import Voice

logger = logging.getLogger(__name__)

PAGE_DIR = Path(__file__).parent / "page"
OWN_PAGE = "/memory/"

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
_OWN_PAGE_POLICY = "default-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'none'"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """The state behind the routes.

    Args:
        voice: the model, opened and closed with the application.
        access: who may use it.
        limits: of each connection.
        max_waiting: connections that may wait for their turn.
    """

    def __init__(
        self, voice: Voice, access: Access, *, limits: Limits | None = None, max_waiting: int = 0
    ) -> None:
        self.voice = voice
        self.access = access
        self.limits = limits or Limits()
        self.turns = Turns(max_waiting)
        self.num_connections = 0
        self._chats: set[Chat] = set()

    def application(self, *, static: Path | None = PAGE_DIR) -> web.Application:
        """The application.

        Args:
            static: folder of the page at `/`; None serves none there. Our own page is at `/memory/` always.
        """
        app = web.Application(middlewares=[self._guard], client_max_size=64 * 1024)
        app.router.add_get("/health", self._health)
        for prefix in ("/", OWN_PAGE):
            app.router.add_get(f"{prefix}api/chat", self._chat)
        _add_page(app, OWN_PAGE, PAGE_DIR)
        if static is not None:
            _add_page(app, "/", static)
        app.on_response_prepare.append(_complete)  # type: ignore[arg-type]  # the type of signals is wrong
        app.on_startup.append(lambda _: self.voice.open())
        app.on_shutdown.append(lambda _: self._say_goodbye())
        app.on_cleanup.append(lambda _: self.voice.close())
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/health":
            self.access.check_host(request)
            return await handler(request)
        self.access.check(request)
        if "token" in request.query and not request.path.endswith("/api/chat"):
            # The token leaves the address bar and the history, a cookie takes its place. Whatever follows the
            # one slash is quoted: two slashes would be another server, and so they are to browsers where
            # a backslash, a tab or a line break stands between them.
            response: web.StreamResponse = web.HTTPFound("/" + quote(request.path.lstrip("/")))
            self.access.remember(response)
            return response
        try:
            return await handler(request)
        except OSError:
            raise web.HTTPNotFound from None  # a name that the file system does not take

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.num_connections += 1
        chat = Chat(request, self.voice, self.turns, limits=self.limits, number=self.num_connections)
        self._chats.add(chat)
        try:
            return await chat.run()
        finally:
            self._chats.discard(chat)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "status": "ok",
                "busy": self.turns.busy,
                "waiting": self.turns.num_waiting,
                "connections": self.num_connections,
                "frame_ms": self.voice.median_frame_ms,
            }
        )

    async def _say_goodbye(self) -> None:
        reason = "the server is shutting down"
        closing = [chat.close(code=CloseCode.GOING_AWAY, reason=reason) for chat in self._chats]
        await asyncio.gather(*closing, return_exceptions=True)


async def _complete(request: web.Request, response: web.StreamResponse) -> None:
    """What every response has, that of a missing file or a refusal too."""
    if isinstance(response, web.WebSocketResponse):
        return
    response.headers.update(_HEADERS)
    response.force_close()  # one request a connection, see `Connection`


def _add_page(app: web.Application, prefix: str, folder: Path) -> None:
    async def index(_: web.Request) -> web.FileResponse:
        return web.FileResponse(folder / "index.html", headers=policy)

    async def to_prefix(_: web.Request) -> NoReturn:
        raise web.HTTPFound(prefix)

    policy = {"Content-Security-Policy": _OWN_PAGE_POLICY} if folder == PAGE_DIR else {}
    app.router.add_get(prefix, index)
    if prefix != "/":
        app.router.add_get(prefix.rstrip("/"), to_prefix)
    app.router.add_static(prefix, folder)
