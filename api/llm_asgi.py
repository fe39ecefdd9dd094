"""Calls an ASGI app without a socket: how the offline `LLM` takes exactly the server's path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

App = Callable[[dict, Callable[[], Awaitable[dict]], Callable[[dict], Awaitable[None]]], Awaitable[None]]
MAX_CHUNKS_AHEAD = 64
"""Chunks a slow reader may leave unread before the app has to wait."""


class RequestFailed(ValueError):
    """The server refused or failed the request; the message is the server's."""

    def __init__(self, status: int, message: str, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body or {"error": {"message": message}}
        """The whole answer."""


async def post(app: App, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The parsed answer of a POST. Raises RequestFailed for any status but 200, and for a stream."""
    if body.get("stream"):
        raise RequestFailed(400, "stream: answers come whole here; use stream_chat or stream_deltas")
    return json.loads(b"".join([chunk async for chunk in _chunks(app, path, body)]))


async def exchange(app: App, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """(Status, parsed answer) of a POST, whatever the status."""
    try:
        return 200, await post(app, path, dict(body))
    except RequestFailed as error:
        return error.status, error.body


async def post_stream(app: App, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Events of a streamed answer; closing the iterator disconnects, which aborts the request. Raises RequestFailed."""
    rest = b""
    chunks = _chunks(app, path, {**body, "stream": True})
    try:
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                data = line[5:].strip() if line.startswith(b"data:") else b"[DONE]"
                if data != b"[DONE]":
                    yield _checked(json.loads(data))
    finally:
        await chunks.aclose()


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise RequestFailed(500, event["error"]["message"])
    return event


async def _chunks(app: App, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Body chunks of the answer. Leaving early tells the app that the client is gone and ends its task."""
    sent: asyncio.Queue[dict] = asyncio.Queue(MAX_CHUNKS_AHEAD)
    gone = asyncio.Event()
    task = asyncio.create_task(_run(app, _scope(path), json.dumps(body, default=_plain).encode(), sent, gone))
    try:
        status = (await _next(sent, task))["status"]
        failure = b""
        while True:
            message = await _next(sent, task)
            if status == 200:
                yield message.get("body", b"")
            else:
                failure += message.get("body", b"")
            if not message.get("more_body"):
                break
        if status != 200:
            raise _failed(status, failure)
    finally:
        gone.set()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _run(app: App, scope: dict, body: bytes, sent: asyncio.Queue[dict], gone: asyncio.Event) -> None:
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    await app(scope, receive, sent.put)


async def _next(sent: asyncio.Queue[dict], task: asyncio.Task) -> dict:
    """The app's next message; an app that ended without one raises what it died of."""
    getter = asyncio.ensure_future(sent.get())
    try:
        await asyncio.wait((getter, task), return_when=asyncio.FIRST_COMPLETED)
        if not getter.done() and sent.empty():
            task.result()
            raise RuntimeError("the app ended without an answer")
        return await getter
    finally:
        getter.cancel()


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy or torch among the settings."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a request cannot hold a {type(value).__name__}")


def _failed(status: int, answer: bytes) -> RequestFailed:
    try:
        body = json.loads(answer)
        return RequestFailed(status, body["error"]["message"], body)
    except (ValueError, KeyError, TypeError):
        return RequestFailed(status, answer.decode(errors="replace"))


def _scope(path: str) -> dict:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"offline"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
