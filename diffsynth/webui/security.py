"""Protection of the server: browsers load nothing from elsewhere, and nothing is fetched for a visitor."""

from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# The page's own scripts need inline code and eval; nothing comes from elsewhere.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; frame-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
# Routes that would fetch what a visitor names.
_FETCHING = ("/proxy=", "/file=http:", "/file=https:", "/file/http:", "/file/https:")


class Guard:
    """An ASGI layer around the app that refuses to fetch for visitors and sets the security headers."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = unquote(scope["path"]).lower()
        if any(route in path for route in _FETCHING):
            await send({"type": "http.response.start", "status": 403, "headers": list(_HEADERS)})
            await send({"type": "http.response.body", "body": b"this server fetches nothing for others"})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        await self._app(scope, receive, send_guarded)


def is_local(host: str) -> bool:
    """Return whether an address that a server listens at can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def read_auth(text: str | None) -> tuple[str, str] | None:
    """Split USER:PASSWORD. Raises ValueError if a part is missing."""
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ValueError("auth must be USER:PASSWORD, both not empty")
    return user, password
