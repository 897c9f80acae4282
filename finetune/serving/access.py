"""Who may use the server: hosts, origins of browsers, the token."""

import hashlib
import hmac
import logging
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web

logger = logging.getLogger(__name__)

COOKIE = "moshi_ttt"
MIN_TOKEN_LENGTH = 16


@dataclass(frozen=True)
class Access:
    """Decides about every request.

    Attributes:
        host: address that the server listens on.
        token: that a request must carry; None lets everybody in who reaches the server.
        secure: the server speaks https.
    """

    host: str
    token: str | None = None
    secure: bool = False

    def check(self, request: web.Request) -> None:
        """Let a request pass.

        Raises:
            web.HTTPForbidden: the name of the server or the origin of the browser's page is foreign.
            web.HTTPUnauthorized: the token is missing or wrong.
        """
        self.check_host(request)
        origin = request.headers.get("Origin")
        if origin is not None and _server_of(origin) != request.host.lower():
            raise _refused(request, web.HTTPForbidden, f"foreign origin {origin!r}")
        if self.token is not None and not self._knows_token(request):
            raise _refused(request, web.HTTPUnauthorized, "missing or wrong token")

    def check_host(self, request: web.Request) -> None:
        """On the loopback address, answer to its own names only.

        A page elsewhere could give its own name the address 127.0.0.1, and would then be no foreign origin.

        Raises:
            web.HTTPForbidden: the request names another server.
        """
        if is_loopback(self.host) and not is_loopback(_name_of(request.host)):
            raise _refused(request, web.HTTPForbidden, f"foreign host {request.host!r}")

    def remember(self, response: web.StreamResponse) -> None:
        """Give a browser that showed the token a cookie that stands for it, where there is a token."""
        if self.token is None:
            return
        response.set_cookie(
            COOKIE, self._cookie(), httponly=True, samesite="Lax", secure=self.secure, path="/"
        )

    def _knows_token(self, request: web.Request) -> bool:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = ((request.query.get("token", ""), self.token), (bearer, self.token))
        cookie = (request.cookies.get(COOKIE, ""), self._cookie())
        return any(_equal(theirs, ours) for theirs, ours in (*given, cookie))

    def _cookie(self) -> str:
        assert self.token is not None
        return hmac.new(self.token.encode(), b"moshi-ttt cookie", hashlib.sha256).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _server_of(origin: str) -> str:
    """`name:port` of an origin, nothing where it is not one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name_of(host: str) -> str:
    """The name in `name:port`, nothing where it is not that."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _equal(theirs: str, ours: str | None) -> bool:
    return hmac.compare_digest(theirs.encode(errors="replace"), (ours or "").encode())


def _refused(request: web.Request, error: type[web.HTTPException], reason: str) -> web.HTTPException:
    logger.warning("refused %s from %s: %s", request.path, request.remote, reason)
    return error(text=f"{error.status_code}: {reason}\n")
