"""What stands between the network and the app: the key, sizes, slow senders and readers, security headers."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import Callable
from typing import Any

from search_r3.serve.settings import Settings

OPEN = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json", "/page/app.js", "/page/style.css"})
"""Paths that need no key: they say nothing about what is indexed."""

logger = logging.getLogger("search_r3.serve")
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


def error_body(message: str, kind: str) -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class _Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Guard:
    """ASGI middleware."""

    def __init__(self, app: Any, settings: Settings):
        self.app, self.settings = app, settings
        self._held = 0  # bytes of bodies in progress

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def sending(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                # FastAPI's own pages load their scripts from elsewhere.
                quiet = scope["path"] not in ("/docs", "/redoc")
                message = message | {"headers": [*message["headers"], *(_HEADERS if quiet else _HEADERS[1:])]}
            async with asyncio.timeout(self.settings.timeout):  # a client that never reads holds nothing for long
                await send(message)

        parts: list[bytes] = []
        try:
            headers = dict(scope["headers"])
            self._check_key(scope, headers)
            await self._read(headers, receive, parts)
            await self._serve(scope, receive, sending, b"".join(parts), lambda: started)
        except _Refused as refused:
            await _answer(sending, refused)
        finally:
            self._held -= sum(map(len, parts))

    async def _serve(self, scope: Any, receive: Any, sending: Any, body: bytes, started: Callable[[], bool]) -> None:
        gone = asyncio.Event()
        given = False

        async def receiving() -> Any:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watching() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answer = asyncio.ensure_future(self.app(scope, receiving, sending))
        watch = asyncio.ensure_future(watching())
        try:
            limit: float | None = self.settings.timeout
            while not answer.done():
                done, _ = await asyncio.wait({answer, watch}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                if watch in done and not answer.done():
                    return  # nobody is there to hear the answer
                if not done and not started():
                    await _cancel(answer)
                    late = f"no answer within {self.settings.timeout:g} s; send less at once, or try again later"
                    raise _Refused(504, late)
                limit = None  # what streams is bounded by the worker's deadline and the reader's
            await answer
        except _Refused:
            raise
        except TimeoutError:
            pass  # the client did not read: the connection ends here
        except Exception as error:
            logger.exception("unexpected error", exc_info=error)
            if not started():
                raise _Refused(500, "unexpected error; the server's log says more") from error
        finally:
            await _cancel(answer)
            await _cancel(watch)

    def _check_key(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        key = self.settings.api_key
        if key is None or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return
        bearer = headers.get(b"authorization", b"")
        given = headers.get(b"x-api-key") or (bearer[7:] if bearer[:7].lower() == b"bearer " else b"")
        if not hmac.compare_digest(given, key.encode()):
            raise _Refused(
                401, "this server asks for a key: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            )

    async def _read(self, headers: dict[bytes, bytes], receive: Any, parts: list[bytes]) -> None:
        """Read the body into `parts`, counted among what is held."""
        limit = self.settings.body_bytes
        too_large = _Refused(413, f"the body is larger than {limit} bytes; send it in parts")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        size, more = 0, True
        try:
            async with asyncio.timeout(self.settings.timeout):
                while more:
                    message = await receive()
                    more = bool(message.get("more_body")) and message["type"] != "http.disconnect"
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._held += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if self._held > self.settings.held_bytes:
                        raise _Refused(429, "too much is being sent; try again in a second")
        except TimeoutError:
            raise _Refused(408, f"the body did not come within {self.settings.timeout:g} s") from None


async def _answer(send: Any, refused: _Refused) -> None:
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    body = json.dumps(error_body(refused.message, kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    if refused.status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
