"""Protection of the server: who may ask for what, and what browsers may load."""

import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from stat import S_ISREG
from typing import Any
from urllib.parse import unquote, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# The page's own scripts need inline code and eval; nothing is loaded from other servers.
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
# Routes that fetch a URL named by the visitor, and the route that lists all routes.
_REFUSED = ("/proxy=", "/file=http:", "/file=https:", "/file/http:", "/file/https:", "/openapi.json")
LARGEST_REQUEST = 1 << 20  # maximum bytes of a request that is not an upload
YOUNG = 600  # age in seconds below which an upload that was not copied yet is never deleted
LONGEST_WAIT = 60.0  # seconds after many wrong passwords
MOST_CLIENTS = 10_000  # whose wrong passwords are counted
UPLOADS_KEPT = 10  # the quota has room for this many uploads of the largest size


class Guard:
    """ASGI middleware that refuses foreign or unsafe requests and sets the security headers."""

    def __init__(
        self,
        app: App,
        *,
        uploads: Path,
        cache: Path,
        host: str = "127.0.0.1",
        allowed: Sequence[str] = (),
        megabytes: float = 200,
    ) -> None:
        self._app = app
        self._names = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in allowed)}
        self._allowed = {name.lower() for name in allowed}
        self._any_address = not is_local(host)
        self._folders = uploads.resolve(), cache.resolve()
        self._wrong: dict[str, tuple[int, float]] = {}  # client -> wrong passwords, time of the next try
        self._quota = int(UPLOADS_KEPT * megabytes * 2**20)
        self._arriving = 0  # bytes of uploads that are being sent

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if reason := self._refusal(scope):
            if scope["type"] == "websocket":  # before accepting, this answers 403
                await send({"type": "websocket.close", "code": 1008, "reason": reason})
            else:
                await _refuse(send, 403, reason)
            return
        login = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/login")
        client = (scope.get("client") or ("",))[0]
        if login and time.monotonic() < self._wrong.get(client, (0, 0))[1]:
            await _refuse(send, 429, "wait before you try another password")
            return
        arrives = 0
        if scope["type"] == "http" and scope["method"] == "POST":
            if scope["path"].endswith("/upload"):
                arrives = int(dict(scope["headers"]).get(b"content-length", self._quota + 1))
                room = self._quota - self._arriving - arrives
                if room < 0 or make_room(self._folders[0], room) > room:
                    while (await receive()).get("more_body"):  # else browsers do not show the answer
                        pass
                    await _refuse(send, 507, "there is no room for this upload now; try again in 10 minutes")
                    return
            else:
                body = await _read_all(receive)
                if body is None:
                    await _refuse(send, 413, f"a request may have at most {LARGEST_REQUEST} bytes")
                    return
                if not self._names_uploads_only(body):
                    await _refuse(send, 403, "the request names a file that was not uploaded here")
                    return
                receive = _replayed(body, receive)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                if login:
                    self._note_login(client, message["status"])
                # By its CORS headers, gradio would let pages from other local ports read the responses.
                own = [
                    h for h in message.get("headers", ()) if not h[0].lower().startswith(b"access-control-")
                ]
                message = {**message, "headers": [*own, *_HEADERS]}
            await send(message)

        self._arriving += arrives
        try:
            await self._app(scope, receive, send_guarded)
        finally:
            self._arriving -= arrives

    def _note_login(self, client: str, status: int) -> None:
        """Let a client wait after each wrong password, twice as long as after the one before."""
        if status < 400:
            self._wrong.pop(client, None)
            return
        if len(self._wrong) > MOST_CLIENTS:
            self._wrong.clear()
        count = self._wrong.get(client, (0, 0))[0] + 1
        self._wrong[client] = count, time.monotonic() + min(2.0 ** min(count - 2, 9), LONGEST_WAIT)

    def _refusal(self, scope: Message) -> str | None:
        """Return why a request is refused for its path or its headers."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = unquote(scope["path"]).lower()
        if any(route in path for route in _REFUSED):
            return "this route is disabled on this server"
        host = headers.get(b"host", "")
        name = urlsplit(f"//{host}").hostname or ""
        # A server on all addresses is reached by any address; an unknown name may be DNS rebinding.
        if name not in self._names and not (self._any_address and _is_address(name)):
            return f"this page is not served as {host[:100]!r}; --allow-host names further hosts"
        origin = headers.get(b"origin")
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD")
        if changes and origin is not None:
            theirs = urlsplit(origin)
            if theirs.netloc.lower() != host.lower() and theirs.hostname not in self._allowed:
                return "requests from other sites are refused"
        return None

    def _names_uploads_only(self, body: bytes) -> bool:
        """Return whether all files that a request names are in the folders of uploads and of shown files."""
        named: list[Any] = []
        try:
            json.loads(body or b"null", object_hook=lambda found: named.append(found.get("path")))
        except (ValueError, RecursionError):
            return True  # not a call of the page's functions
        try:
            real = [Path(path).resolve() for path in named if isinstance(path, str)]
        except (OSError, ValueError, RuntimeError):
            return False
        return all(any(path.is_relative_to(folder) for folder in self._folders) for path in real)


def make_room(folder: Path, most: int) -> int:
    """Delete the oldest uploads of a folder until at most `most` bytes are left, but none under YOUNG.

    Returns:
        The bytes that are left.
    """
    found = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            facts = path.lstat()
            if S_ISREG(facts.st_mode):
                found.append((facts.st_mtime, facts.st_size, path))
    total = sum(size for _, size, _ in found)
    for modified, size, path in sorted(found):
        if total <= most or modified > time.time() - YOUNG:
            break
        path.unlink(missing_ok=True)
        total -= size
    return total


async def _read_all(receive: Receive) -> bytes | None:
    """Return the body of a request; None if it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_REQUEST:
            return None
        if not message.get("more_body"):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI `receive` that yields the body, then the messages of the original."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [*_HEADERS, (b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_local(host: str) -> bool:
    """Return whether an address that a server listens at can be reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def read_auth(text: str | None, file: Path | None = None) -> tuple[str, str] | None:
    """Return the user and password to ask for; None to ask for none.

    Args:
        text: USER:PASSWORD; by default the environment variable FASTVMT_AUTH, because everybody on the
            machine can read a command line.
        file: a file whose first line is USER:PASSWORD; takes precedence over text.

    Raises:
        ValueError: the user or the password is missing.
        OSError: the file cannot be read.
    """
    if file is not None:
        text = file.read_text().split("\n")[0].strip()
    elif text is None:
        text = os.environ.get("FASTVMT_AUTH")
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ValueError("auth must be USER:PASSWORD, both not empty")
    return user, password
