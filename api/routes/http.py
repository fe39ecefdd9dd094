"""What the routes share: reading a body, response ids."""

from __future__ import annotations

import logging
import uuid
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from fuseline.api.errors import ApiError, bad_request, to_api_error
from fuseline.api.output.response import json_response
from fuseline.api.protocol.common import FieldError
from fuseline.api.protocol.json_body import parse_object

__all__ = ["json_response", "new_id", "read_body"]
LOG = logging.getLogger("fuseline.http")
MAX_BODY = 64 * 2**20
Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The validated body. Raises ApiError 400, 413, 415."""
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, "Unsupported media type: only application/json is allowed.")
    fields = parse_object(await _read(request))
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
