"""Helpers of all routes: reading a body, having it prepared, response ids."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec.structs import replace
from starlette.requests import ClientDisconnect, Request

from fuseline.api.errors import ApiError, bad_request
from fuseline.api.output.response import json_response, raw_response, until_disconnect
from fuseline.api.prompt.bodies import Held
from fuseline.api.prompt.prepared import Prepared, Written
from fuseline.api.protocol.common import MAX_NAME
from fuseline.api.tracing import find_trace_headers

if TYPE_CHECKING:
    from fuseline.api.admission import Places
    from fuseline.api.prompt.prepare import Kind
    from fuseline.api.served import Served

__all__ = ["json_response", "new_id", "prepare", "raw_response", "read_body"]
LOG = logging.getLogger("fuseline.http")
SOON = 0.02
"""Seconds after which it is looked for whether the client of a request that is being prepared has gone."""
T = TypeVar("T")


async def prepare(
    request: Request,
    kind: Kind,
    places: Places | None = None,
    rewrite: Callable[[list[bytes]], list[bytes]] | None = None,
) -> Prepared | Written:
    """The body parsed, validated, rendered and encoded; meanwhile the request is counted as one of `places`.

    `rewrite` puts into the body what the server knows of it.

    Raises ApiError, and ClientDisconnect for a client that leaves, whose process is freed.
    """
    served: Served = request.app.state.served
    with served.bodies.hold() as held:
        pieces = await read_body(request, held)
        if rewrite is not None:
            pieces = rewrite(pieces)
        if places is not None:
            places.take(1)
        reply = await _unless_gone(request, served.prepare(kind, pieces))
    _warn_unknown(request, reply.unknown)
    if isinstance(reply, Prepared) and (headers := find_trace_headers(request.headers)):
        return replace(reply, trace_headers=served.trace_headers(headers))
    return reply


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait((task,), timeout=SOON)
        if not done and not await until_disconnect(request.receive, task):
            raise ClientDisconnect()
        return task.result()
    finally:
        task.cancel()


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
    """The response id; its random part can come from X-Request-Id or the body. Raises ApiError 400."""
    sent = request.headers.get("x-request-id")
    if sent and len(sent) > MAX_NAME:  # every chunk of the answer repeats it
        raise bad_request(f"X-Request-Id: at most {MAX_NAME} characters are allowed", "X-Request-Id")
    return prefix + (sent or given or uuid.uuid4().hex)
