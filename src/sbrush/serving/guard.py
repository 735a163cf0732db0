"""Checks before every route: key, host name, origin, size and time of a request.

A page of another site can make its reader's browser ask a server on 127.0.0.1. Two checks keep it out. The Host header
is to be an address or a known name: a foreign name that was made to lead here (DNS rebinding) is neither. And what a
browser sends from a page has its Origin, which is to be this server's own.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from sbrush.console import info
from sbrush.serving.address import Access
from sbrush.serving.answers import error
from sbrush.serving.counters import Counters

LARGEST_BODY = 1 << 20  # bytes
LARGEST_HEADERS = 16 << 10  # bytes
LONGEST_URL = 4096  # bytes
BODY_SECONDS = 15.0  # in which a request's body is to arrive
OPEN = ("/health",)  # paths that need no key
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI app around another. Requests that it lets through have their whole body read.

    A client that goes away cancels what it asked for. `counters` counts every answer.
    """

    def __init__(self, app: App, access: Access, counters: Counters) -> None:
        self._app, self._access, self._counters = app, access, counters

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        headers = Headers(scope=scope)
        refusal = _refuse_size(scope) or self._refuse(scope["path"], headers)
        body = b""
        if refusal is None:
            read = await _read(receive, headers)
            body, refusal = (read, None) if isinstance(read, bytes) else (b"", read)
        if refusal:
            refusal.headers["connection"] = "close"  # what comes of its body is not read
            await refusal(scope, receive, counted)
        elif not await self._serve(scope, body, receive, counted):
            self._counters.dropped.labels("disconnected").inc()
            return
        elif not status:  # its bug was logged
            await error(500, "something went wrong here", "the server's log says where")(scope, receive, counted)
        route = getattr(scope.get("route"), "path", "other")
        self._counters.count_answer(route, status, time.perf_counter() - start)

    async def _serve(self, scope: Message, body: bytes, receive: Receive, send: Send) -> bool:
        """Runs the app, unless the client goes away first: then it is cancelled, and this is False."""
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        work = asyncio.ensure_future(self._app(scope, replay, send))
        gone = asyncio.ensure_future(receive())  # behind the body comes nothing but the disconnect
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finished = work.done()
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
        problem = (await asyncio.gather(work, return_exceptions=True))[0]
        if isinstance(problem, Exception):
            info(f"error: {scope['method']} {scope['path']!r}: {type(problem).__name__}")  # its text may tell a prompt
        return finished

    def _refuse(self, path: str, headers: Headers) -> Response | None:
        """The answer to a request that is not let in."""
        host = headers.get("host", "")
        if not self._is_known(host):
            return error(
                403, "this server is not known by that name", "call it by its address, or start it with --allow-host"
            )
        if not self._is_own(headers, host):
            return error(
                403, "pages of other sites may not ask this server", "start it with --allow-origin to allow one"
            )
        if path not in OPEN and not self._has_key(headers):
            hint = "send the key as 'Authorization: Bearer KEY', not in the URL; a browser takes it as the password"
            return error(401, "no valid API key", hint, headers={"www-authenticate": 'Basic realm="sbrush"'})
        return None

    def _is_known(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name.lower() in ("localhost", *(known.lower() for known in self._access.hosts)):
            return True
        try:  # an address cannot be made to lead elsewhere
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    def _is_own(self, headers: Headers, host: str) -> bool:
        origin = headers.get("origin")
        if origin is not None:
            return origin.partition("://")[2] == host or origin in self._access.origins
        # A link that is followed from elsewhere is no harm: nothing here is done by a GET.
        foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        return not foreign or headers.get("sec-fetch-mode") == "navigate"

    def _has_key(self, headers: Headers) -> bool:
        if self._access.api_key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode("utf-8"), self._access.api_key.encode("utf-8"))


def _refuse_size(scope: Message) -> Response | None:
    """The answer to a URL or headers that are too long. h11 has a bound for those alone that come in pieces."""
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_URL:
        return error(414, f"a URL of more than {LONGEST_URL:,} bytes", "send a shorter one")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > LARGEST_HEADERS:
        return error(431, f"headers of more than {LARGEST_HEADERS:,} bytes", "send fewer")
    return None


async def _read(receive: Receive, headers: Headers) -> bytes | Response:
    """A request's whole body, or the answer to one that is too large, too slow, packed or broken off."""
    too_large = error(413, f"a body of more than {LARGEST_BODY:,} bytes", "send a shorter one")
    if headers.get("content-encoding", "identity") != "identity":
        return error(415, "packed bodies are not read", "send it without Content-Encoding")
    if "transfer-encoding" in headers and "content-length" in headers:
        return error(400, "Transfer-Encoding and Content-Length contradict each other", "send one of them")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > LARGEST_BODY:
        return too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return error(400, "the body breaks off", "send it whole")
                body += message.get("body", b"")
                if len(body) > LARGEST_BODY:
                    return too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        return error(408, f"the body took more than {BODY_SECONDS:g} seconds", "send it faster")
