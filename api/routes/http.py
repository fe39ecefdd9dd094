"""What the routes share: reading a body, answering whole or as a stream, noticing that the client has gone."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from fuseline.api.errors import ApiError, to_api_error
from fuseline.api.output.outbox import Outbox
from fuseline.api.prompt.bodies import Held
from fuseline.api.prompt.prepared import Prepared, Written

if TYPE_CHECKING:
    from fuseline.api.prompt.prepare import Kind
    from fuseline.api.served import Served

LOG = logging.getLogger("fuseline.http")
SMALL_BYTES = 65536
"""A body up to this size is prepared so soon that its client's leaving meanwhile is not looked for."""
WRITE_BYTES = 262144
"""Most bytes that one write hands to a connection."""
T = TypeVar("T")
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def prepare(request: Request, kind: Kind) -> Prepared | Written:
    """The body parsed, validated, rendered and encoded. Raises ApiError; a client that leaves frees its place."""
    served: Served = request.app.state.served
    with served.bodies.hold() as held:
        pieces = await read_body(request, held)
        preparing = served.prepare(kind, pieces)
        is_small = held.num_bytes <= SMALL_BYTES
        reply = await (preparing if is_small else until_disconnect(request, preparing))
    _warn_unknown(request, reply.unknown)
    return reply


async def read_body(request: Request, held: Held) -> list[bytes]:
    """The pieces of a JSON body. Raises ApiError 413, 415, 429."""
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, "Unsupported media type: only application/json is allowed.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit():
        request.app.state.served.bodies.check(int(announced))
    pieces: list[bytes] = []
    async for piece in request.stream():
        held.add(len(piece))
        pieces.append(piece)
    return pieces


def _warn_unknown(request: Request, names: tuple[str, ...]) -> None:
    """Once per set of names, so that a client cannot fill the log."""
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
    return raw_response([msgspec.json.encode(body)])


def raw_response(pieces: list[bytes]) -> Response:
    """A JSON body in pieces; a large one is written at the client's pace."""
    size = sum(map(len, pieces))
    if size <= WRITE_BYTES:
        return Response(b"".join(pieces), media_type="application/json")
    headers = {"Content-Length": str(size)}
    return StreamingResponse(_in_writes(pieces), media_type="application/json", headers=headers)


async def _in_writes(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), WRITE_BYTES):
            yield piece[at : at + WRITE_BYTES]
