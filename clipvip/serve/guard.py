"""Which requests the server answers, and the headers that keep a browser from doing more with the
answers than showing them.

Any web page can make a browser send requests to a server on the same machine. So a request must
name this server (a page whose name was pointed at this machine names its own), and it must not come
from a page of another origin.
"""

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
LONGEST_URL = 8_000  # bytes


class Guard:
    """An ASGI application that answers for this server's own pages and for programs, no others.

    host: the name or address that the server was told to listen on. local: whether only this
    machine can reach it.
    """

    def __init__(self, app: ASGIApp, host: str, local: bool) -> None:
        self.app = app
        self.names = {"localhost", host.lower()}
        if not local:
            own = socket.gethostname().lower()
            self.names |= {own, f"{own}.local", socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self.refusal(scope)
        app: Any = self.app
        if refusal is not None:
            status, sentence = refusal
            app = JSONResponse({"error": sentence}, status)
        await app(scope, receive, send_with_headers)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason why a request is refused; None where it is not."""
        headers = Headers(scope=scope)
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_URL:
            return 414, f"the address is longer than {LONGEST_URL} bytes"
        if not self._is_this_server(headers.getlist("host")):
            return 403, "the Host header names another server; open the address that was printed"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers["host"]:
            return 403, "requests from pages of another site are refused"
        # A link from elsewhere may open the page, but nothing may be embedded or read there.
        site = headers.get("sec-fetch-site", "none")
        page = not scope["path"].startswith("/api/") and scope["method"] in ("GET", "HEAD")
        if site not in ("same-origin", "none") and not page:
            return 403, "requests from pages of another site are refused"
        return None

    def _is_this_server(self, hosts: list[str]) -> bool:
        if len(hosts) != 1:
            return False
        try:
            name = urlsplit(f"//{hosts[0]}").hostname or ""
        except ValueError:
            return False
        return name in self.names or _address(name) is not None


def _address(name: str) -> Any:
    """Return an IP address, which no foreign name server can point elsewhere; None for a name."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
