"""What the routes share: reading a body, answering whole or as a stream, noticing that the client has gone."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from fuseline.api.errors import ApiError, bad_request, to_api_error
from fuseline.api.output.outbox import Outbox
from fuseline.api.protocol.common import FieldError

LOG = logging.getLogger("fuseline.http")
MAX_BODY = 64 * 2**20
Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The validated body. Raises ApiError 400, 413, 415."""
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, "Unsupported media type: only application/json is allowed.")
    raw = await _read(request)
    try:
        fields = json.loads(raw)
        if b"\\u" in raw:
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise bad_request("the body holds half of a surrogate pair, which is no text") from error
    except RecursionError as error:
        raise bad_request("the body is nested too deeply") from error
    except ValueError as error:
        raise bad_request(f"the body is no valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object")
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        inner = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(inner, FieldError):
            raise bad_request(str(inner), inner.param) from error
        raise to_api_error(error) from error
    _warn_unknown(request, body)
    return body


async def _read(request: Request) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _warn_unknown(request: Request, body: BaseModel) -> None:
    """Once per set of names, so that a client cannot fill the log."""
    names = tuple(sorted(body.model_extra or ()))
    seen: set = request.app.state.unknown_fields
    if names and names not in seen and len(seen) < 100:
        seen.add(names)
        LOG.warning("%s: unknown fields ignored: %s", request.url.path, ", ".join(names)[:500])


def new_id(prefix: str, request: Request, given: str | None = None) -> str:
    """The response id; its random part can come from X-Request-Id or the body."""
    return prefix + (request.headers.get("x-request-id") or given or uuid.uuid4().hex)


def sse(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def stream(request: Request, chunks: AsyncIterator[dict[str, Any]], keep_alive: float) -> Response:
    """Waits for the first chunk, so that a refusal keeps its status; then sends events until the end.

    A client that leaves while it waits frees its place.
    """
    first = await until_disconnect(request, anext(chunks, None))
    return StreamingResponse(
        _writes(first, chunks, keep_alive), media_type="text/event-stream; charset=utf-8", headers=SSE_HEADERS
    )


async def _writes(
    first: dict[str, Any] | None, chunks: AsyncIterator[dict[str, Any]], keep_alive: float
) -> AsyncIterator[bytes]:
    """What there is to send, one write for all that a step of the engine has brought."""
    outbox = Outbox(keep_alive)
    if first is not None:
        outbox.add(sse(first))
    filling = asyncio.ensure_future(_fill(outbox, chunks))
    try:
        await asyncio.sleep(0)  # what came with the first chunk goes with it
        while written := await outbox.take():
            yield written
    finally:
        outbox.close()
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)


async def _fill(outbox: Outbox, chunks: AsyncIterator[dict[str, Any]]) -> None:
    try:
        async with aclosing(chunks):
            async for body in chunks:
                outbox.add(sse(body))
    except Exception as error:
        outbox.add(sse(_failure(error).body()))
    outbox.add(b"data: [DONE]\n\n")
    outbox.close()


def _failure(error: Exception) -> ApiError:
    mapped = to_api_error(error)
    if mapped.code == "internal_error" and not isinstance(error, ApiError):
        LOG.exception("error in a stream", exc_info=error)
    return mapped


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect()
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def json_response(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
