"""ASGI middleware: pace, refusals of the connection, API keys on the raw path, HEAD, request ids, the user's own."""

from __future__ import annotations

import hmac
import importlib
import inspect
import uuid
from typing import Any

from fuseline.api.config import ConfigError
from fuseline.api.errors import ApiError
from fuseline.api.output.pace import LARGE, Turns

OPEN_PATHS = {
    "/", "/health", "/ping", "/version", "/metrics", "/metrics/", "/docs", "/redoc", "/openapi.json",
    "/docs/oauth2-redirect",
    "/web/app.js", "/web/app.css", "/web/icon.svg", "/favicon.ico",
}  # fmt: skip


class PaceMiddleware:
    """Requests that come at once start one after the other, the smaller ones first: routing one takes half a
    millisecond, and a crowd would have it all in one round of the event loop."""

    def __init__(self, app, turns: Turns) -> None:
        self._app = app
        self._turns = turns

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            await self._turns.rest(_num_bytes(scope["headers"]))
        await self._app(scope, receive, send)


def _num_bytes(headers: list[tuple[bytes, bytes]]) -> int:
    """Bytes of the body, as far as the headers tell."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value)
        if name == b"transfer-encoding":
            return LARGE
    return 0


class KeyMiddleware:
    """Everything needs a key but OPEN_PATHS and OPTIONS (SPEC 2.4, D2)."""

    def __init__(self, app, keys: tuple[str, ...], root_path: str) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._root = root_path.rstrip("/")

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or self._is_open(scope) or self._has_key(scope):
            return await self._app(scope, receive, send)
        refusal = ApiError(401, "a valid API key is needed (Authorization: Bearer KEY)", code="invalid_api_key")
        await refusal.response()(scope, receive, send)

    def _is_open(self, scope) -> bool:
        path = scope["path"]
        if self._root and path.startswith(self._root + "/"):
            path = path[len(self._root) :]
        return path in OPEN_PATHS

    def _has_key(self, scope) -> bool:
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if own := headers.get(b"x-api-key"):  # as Anthropic's clients send it
            scheme, key = b"bearer", own
        # Every key is compared, so that time tells nothing about which one was close.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class RefusalMiddleware:
    """Answers requests that the connection has refused before they were complete (api/http1.py)."""

    def __init__(self, app) -> None:
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        refusal: ApiError | None = scope.get("state", {}).get("refusal")
        await (self._app if refusal is None else refusal.response())(scope, receive, send)


class HeadMiddleware:
    """HEAD is GET without the body, on every route."""

    def __init__(self, app) -> None:
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)

        async def without_body(message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        inner = {**scope, "method": "GET"}
        try:
            await self._app(inner, receive, without_body)
        finally:
            scope.update({name: inner[name] for name in ("route",) if name in inner})


class RequestIdMiddleware:
    """X-Request-Id on every response."""

    def __init__(self, app) -> None:
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        value = given or uuid.uuid4().hex.encode()

        async def with_id(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", value)]
            await send(message)

        await self._app(scope, receive, with_id)


def load_middleware(path: str) -> Any:
    """What --middleware names: an ASGI class or a coroutine function. Raises ConfigError."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the operator's module does
        reason = " ".join(str(error).split())
        raise ConfigError(f"--middleware {path} cannot be imported ({reason}); give module.name") from error
    if not (inspect.isclass(found) or inspect.iscoroutinefunction(found)):
        raise ConfigError(f"--middleware {path} is neither a class nor a coroutine function")
    return found
