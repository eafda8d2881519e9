"""What the server refuses before Gradio sees it: other web sites, uploads, long bodies, and being a proxy."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from genkit_apps.cli import loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: Bytes of a request's body: texts and numbers, never files.
MAX_BODY = 1 << 20
_UPLOAD = re.compile(r"/upload(_progress)?/?$|/component_server/?$|/process_recording/?$")
_LINK = re.compile(r"/deep_link/?$")  # writes a session's fields to a file, which stays
#: Gradio writes the parameters of every event, with the names of models, into the page that asks for the password, too.
_API = re.compile(rb"(?<=window\.gradio_api_info = ).*?(?=;</script>)", re.DOTALL)
_PROXY = re.compile(r"/proxy=|/file=(https?|ftp):", re.IGNORECASE)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
        b"base-uri 'self'; frame-ancestors 'self'",
    ),
)


class Guard:
    """ASGI middleware around the app.

    Args:
        app: what it guards.
        max_body: bytes of a request's body.
        local: answer to names of this machine only. Without a password a page of another site could else give its own
            name this machine's address (DNS rebinding), and use the app as if it were its own.
    """

    def __init__(self, app: ASGI, max_body: int = MAX_BODY, local: bool = False) -> None:
        self.app, self.max_body, self.local = app, max_body, local

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = str(scope["path"]), {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        if self.local and not loopback(_host(headers.get(b"host", ""))):
            await _refuse(send, 403, "this app answers to localhost and 127.0.0.1 only; --password lets it have other names")
        elif _foreign(headers):
            await _refuse(send, 403, "this app takes no requests from pages of other sites")
        elif scope["method"] == "POST" and _UPLOAD.search(path):
            await _refuse(send, 403, "this app takes no uploads")
        elif _LINK.search(path):
            await _refuse(send, 403, "this app makes no links to what a session shows")
        elif _PROXY.search(path):
            await _refuse(send, 403, "this app fetches nothing from elsewhere")
        elif _length(scope) > self.max_body:
            await _refuse(send, 413, f"the body is longer than {self.max_body} bytes")
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body:  # sent in chunks, without a length
                return {"type": "http.disconnect"}
            return message

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            elif b'"auth_required":true' in message.get("body", b""):
                message = {**message, "body": _API.sub(_blank, message["body"])}
            await send(message)

        await self.app(scope, counted, hardened)


def _blank(found: re.Match[bytes]) -> bytes:
    return b'{"named_endpoints": {}, "unnamed_endpoints": {}}'.ljust(len(found[0]))  # the length is told already


def _host(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def _foreign(headers: dict[bytes, str]) -> bool:
    """Whether a script or form of another site asks. Gradio lets all of them in where the app's name is not localhost."""
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
    if origin is None:  # a program, a link, or the page itself
        return False
    if site is not None:  # behind a proxy the app may have another name than its page
        return site != "same-origin"
    return origin.partition("://")[2] not in (headers.get(b"host"), headers.get(b"x-forwarded-host"))


def _length(scope: MutableMapping[str, Any]) -> int:
    given = dict(scope.get("headers", ())).get(b"content-length", b"0")
    return int(given) if given.isdigit() else 0


async def _refuse(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["MAX_BODY", "Guard"]
