"""Checks the requests to a page of Gradio.

Only requests of the page itself pass, of known kinds and limited size.
"""

import asyncio
import ipaddress
import json
import math
import os
import re
import stat
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.formparsers import MultiPartException

from stvit.safe_text import printable

from ..common.cli import reason
from .scratch import Storage

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_API = "/gradio_api"
# Paths that the page needs. Gradio has more, such as a proxy for other addresses and calls that skip the queue.
_READ = re.compile(
    r"(?!/gradio_api(/|$)|/monitoring)/.*|/gradio_api/(app_id|file=(?!https?:).*|heartbeat/[^/]+|info|login_check|"
    r"queue/(data|status)|startup-events|theme\.css|upload_progress|user)/?",
    re.IGNORECASE | re.DOTALL,
)
_WRITE = re.compile(r"/gradio_api/(upload|queue/join|cancel|reset)")
# Bytes of the largest message that is not an upload. Messages of the page have a few hundred.
MAX_MESSAGE = 2**16
MESSAGE_S = 30.0
UPLOAD_S = 300.0
MAX_UPLOADS = 32
_MAX_TEXT = 300


class _RefusedError(MultiPartException):
    """Raised for a request that the guard refuses.

    Gradio removes the incomplete files of an upload when it catches a `MultiPartException`.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------------------------
# Addresses


class Hosts:
    """The addresses that a page answers to.

    A browser sends the host of the address with each request, and other pages cannot change it. A host that is unknown
    here belongs to another page, whose owner made its name resolve to this machine ("DNS rebinding").
    """

    def __init__(self, host: str, port: int, allowed: Sequence[str] = ()) -> None:
        """Collects the addresses.

        Args:
            host: Address or name that the server listens on. 127.0.0.1 includes localhost. 0.0.0.0 includes localhost
                and every IP address, because rebinding needs a name.
            port: Port that the server listens on.
            allowed: Further addresses: NAME, with any port, or NAME:PORT.
        """
        is_local = host == "localhost" or _is_ip(host, "is_loopback")
        self.takes_ips = not host or _is_ip(host, "is_unspecified")
        names = {host.lower()} | ({"localhost", "127.0.0.1"} if is_local or self.takes_ips else set())
        self._named = {(name, port) for name in names} | {_split(address) for address in allowed}

    def takes(self, host: str) -> bool:
        """Returns whether a Host header is one of the page's addresses."""
        name, port = _split(host)
        if self.takes_ips and _is_ip(name):
            return True
        return name != "" and self._is_named(name, port)

    def takes_origin(self, origin: str, host: str) -> bool:
        """Returns whether an Origin header names the page itself.

        Args:
            origin: Origin header of the request.
            host: Host header of the request.
        """
        try:
            parts = urlsplit(origin)
            default = {"http": 80, "https": 443}[parts.scheme]
            name, port = parts.hostname or "", parts.port or default
        except (KeyError, ValueError):  # "null", or a header that no browser sends
            return False
        own_name, own_port = _split(host)
        return (name, port) == (own_name, own_port or default) or self._is_named(name, port)

    def _is_named(self, name: str, port: int | None) -> bool:
        ports = (80, 443) if port is None else (port,)
        return (name, None) in self._named or any((name, number) in self._named for number in ports)


def _split(address: str) -> tuple[str, int | None]:
    """Returns name and port of NAME:PORT, NAME or [ADDRESS]:PORT."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:]*))(?::(\d{1,5}))?", address.strip().lower())
    if match is None:
        return "", None
    return (match[1] or match[2]).rstrip("."), int(match[3]) if match[3] else None


def _is_ip(name: str, kind: str = "version") -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(name), kind))
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def check_event(page: Any, folder: Path, message: Any) -> dict[str, Any]:
    """Returns the message of an event, reduced to the keys that the page sends.

    Args:
        page: The page, a `gradio.Blocks`.
        folder: Folder of the uploads.
        message: Parsed JSON of `queue/join`.

    Raises:
        _RefusedError: If the page would not send this message. Examples are a file that was not uploaded, and an input
            of a wrong type.
    """
    message = message if isinstance(message, dict) else {}
    index, session, data = (message.get(key) for key in ("fn_index", "session_hash", "data"))
    function = page.fns.get(index) if type(index) is int else None
    if function is None or not _is_id(session):
        raise _RefusedError(400, "unknown event; reload the page")
    if not isinstance(data, list) or len(data) != len(function.inputs):
        raise _RefusedError(400, f"expected a list of {len(function.inputs)} inputs; reload the page")
    inputs = [
        _check_input(type(block).__name__, value, folder) for block, value in zip(function.inputs, data, strict=True)
    ]
    event = _check_place(message.get("event_data")) if function.collects_event_data else None
    trigger = message.get("trigger_id")
    trigger = trigger if type(trigger) is int else None
    return {"data": inputs, "event_data": event, "fn_index": index, "trigger_id": trigger, "session_hash": session}


def check_end(message: Any) -> dict[str, Any]:
    """Reduces the message that cancels or resets an event to the page's keys.

    Args:
        message: Parsed JSON of `cancel` or `reset`.
    """
    message = message if isinstance(message, dict) else {}
    checked = {key: message[key] for key in ("session_hash", "event_id") if _is_id(message.get(key))}
    return {**checked, **({"fn_index": message["fn_index"]} if type(message.get("fn_index")) is int else {})}


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value) is not None


def _check_input(kind: str, value: Any, folder: Path) -> Any:
    if kind == "State" or value is None:  # the server uses its own state
        return None
    if kind == "Image" and isinstance(value, dict):
        return {"path": _check_upload(value.get("path"), folder), "meta": {"_type": "gradio.FileData"}}
    if kind in ("Dropdown", "Radio") and isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable():
        return value
    if kind == "Slider" and type(value) in (int, float) and math.isfinite(value):
        return value
    raise _RefusedError(400, f"wrong value for a {kind}; reload the page")


def _check_upload(path: Any, folder: Path) -> str:
    try:
        real = Path(path).resolve()
        if real.is_relative_to(folder.resolve()) and stat.S_ISREG(real.lstat().st_mode):
            return str(path)
    except (OSError, RuntimeError, TypeError, ValueError):
        pass
    raise _RefusedError(400, "that is no uploaded image; upload a file")


def _check_place(event: Any) -> dict[str, Any]:
    """Returns the event of a click on a pixel of a picture."""
    place = event.get("index") if isinstance(event, dict) else None
    if isinstance(place, list) and len(place) == 2 and all(type(x) in (int, float) and math.isfinite(x) for x in place):
        return {"index": place, "value": None, "selected": True}
    raise _RefusedError(400, "expected a pixel of the picture; click on the picture")


# ---------------------------------------------------------------------------------------------------------------------
# Requests


class Guard:
    """ASGI middleware in front of a page of Gradio."""

    def __init__(self, app: Any, *, page: Any, hosts: Hosts, storage: Storage) -> None:
        """Stores the application and its limits.

        Args:
            app: ASGI application that answers the requests that pass.
            page: The page, a `gradio.Blocks`.
            hosts: Addresses of the page.
            storage: Uploads of the page. An upload is refused if stored and unfinished uploads exceed the limit.
        """
        self.app = app
        self.page = page
        self.hosts = hosts
        self.storage = storage
        self._receiving = 0  # bytes of unfinished uploads
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        try:
            self._check_address(scope)
            if scope["type"] == "websocket":
                raise _RefusedError(403, "the page has no websockets")
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                if not _READ.fullmatch(path):
                    raise _RefusedError(404, "the page has no such address")
                await self._pass_on(scope, receive, send)
            elif scope["method"] != "POST" or not _WRITE.fullmatch(path):
                raise _RefusedError(404, "the page has no such address")
            elif path == f"{_API}/upload":
                await self._receive_upload(scope, receive, send)
            else:
                message = _parse(await self._read_message(receive))
                if path == f"{_API}/queue/join":
                    message = check_event(self.page, self.storage.folder, message)
                else:
                    message = check_end(message)
                await self._pass_on(scope, _repeat(json.dumps(message).encode(), receive), send)
        except _RefusedError as error:
            await _refuse(scope, receive, send, error)

    def _check_address(self, scope: Scope) -> None:
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts, origins = ([value for name, value in headers if name == key] for key in (b"host", b"origin"))
        if len(hosts) != 1 or not self.hosts.takes(hosts[0]):
            name = printable(hosts[0][:200]) if hosts else ""
            raise _RefusedError(
                403,
                f"Host '{name}' is not an address of this page; to allow it, start the page with --allow-host={name}",
            )
        if any(not self.hosts.takes_origin(origin, hosts[0]) for origin in origins):
            raise _RefusedError(
                403, f"Origin '{printable(origins[0][:200])}' is another page; only requests of this page are accepted"
            )

    async def _read_message(self, receive: Receive) -> bytes:
        body = bytearray()
        async for part in _parts(receive, MESSAGE_S):
            body += part
            if len(body) > MAX_MESSAGE:
                raise _RefusedError(413, f"the message is larger than the limit of {MAX_MESSAGE} bytes")
        return bytes(body)

    async def _receive_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._uploads >= MAX_UPLOADS:
            raise _RefusedError(503, "too many uploads at once; try again in a minute")
        length = dict(scope["headers"]).get(b"content-length", b"")
        self._check_room(int(length) if re.fullmatch(rb"\d{1,18}", length) else 0)
        parts = _parts(receive, UPLOAD_S)
        refused: list[_RefusedError] = []
        received, is_whole = 0, False

        async def receive_part() -> MutableMapping[str, Any]:
            nonlocal received, is_whole
            if is_whole:
                return await receive()
            try:
                async for part in parts:
                    self._check_room(len(part))
                    self._receiving += len(part)
                    received += len(part)
                    return {"type": "http.request", "body": part, "more_body": True}
            except _RefusedError as error:
                refused.append(error)
                raise
            is_whole = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send_unless_refused(message: MutableMapping[str, Any]) -> None:
            if not refused:
                await send(message)

        self._uploads += 1
        try:
            await self._pass_on(scope, receive_part, send_unless_refused)
        except _RefusedError as error:  # Gradio may also catch the error in `receive_part`
            refused[:] = refused or [error]
        finally:
            self._uploads -= 1
            getattr(self.page, "upload_file_set", set()).clear()  # Gradio never removes the names of uploads
            await asyncio.shield(asyncio.to_thread(self.storage.sweep))
            self._receiving -= received
        if refused:
            raise refused[0]

    def _check_room(self, size: int) -> None:
        """Checks that further bytes fit beside the stored and the unfinished uploads.

        Raises:
            _RefusedError: If they do not fit.
        """
        if self.storage.stored + self._receiving + size > self.storage.limit:
            limit = self.storage.limit / 2**20
            raise _RefusedError(
                413, f"the uploads of all users exceed the limit of {limit:g} MB; try again in a few minutes"
            )

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the page answer.

        An error that Gradio does not catch becomes one line in the log.
        """
        is_answered = False

        async def note(message: MutableMapping[str, Any]) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            await self.app(scope, receive, note)
        except _RefusedError:
            raise
        except Exception as error:
            if os.environ.get("STVIT_TRACEBACK"):
                traceback.print_exc()
            where = printable(f"{scope['method']} {scope['path']}"[:200])
            print(
                f"error: {where}: {type(error).__name__}: {printable(reason(error)[:200])}", file=sys.stderr, flush=True
            )
            if not is_answered:
                raise _RefusedError(500, "the page cannot answer this request") from None


async def _parts(receive: Receive, seconds: float) -> Any:
    """Yields the parts of a request's body.

    Raises:
        _RefusedError: If the client disconnects, or does not send the body in time.
    """
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            message = await asyncio.wait_for(receive(), end - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise _RefusedError(408, f"the request took longer than {seconds:g} seconds to arrive") from None
        if message["type"] != "http.request":
            raise _RefusedError(400, "the connection was closed before the request was complete")
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (RecursionError, ValueError):
        raise _RefusedError(400, "the message is not JSON") from None


def _repeat(body: bytes, receive: Receive) -> Receive:
    """Returns a function that first returns the body, then calls `receive`."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def repeat() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return repeat


async def _refuse(scope: Scope, receive: Receive, send: Send, error: _RefusedError) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": error.message})
        return
    body = f"{error.message}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
