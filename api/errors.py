"""Errors as clients see them: OpenAI's own body (SPEC 2.2), made in one place."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fuseline.engine.client import EngineDeadError

MAX_MESSAGE = 2000
"""Characters of a message; keeps a body below 4 KB."""
KINDS = {429: "rate_limit_error", 500: "server_error", 501: "server_error", 503: "server_error"}
CODES = {
    404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large",
    415: "unsupported_media_type", 429: "rate_limit_exceeded", 431: "request_headers_too_large",
}  # fmt: skip


class ApiError(Exception):
    """A refusal with its HTTP status; `param` names the offending field."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODES.get(status)
        self.retry_after = retry_after
        self.headers = dict(headers or {})

    def body(self) -> dict:
        kind = KINDS.get(self.status, "invalid_request_error")
        message = self.message if len(self.message) <= MAX_MESSAGE else self.message[:MAX_MESSAGE] + "..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response_headers(self) -> dict[str, str]:
        headers = self.headers | ({} if self.retry_after is None else {"Retry-After": str(self.retry_after)})
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.response_headers())


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def to_api_error(error: Exception) -> ApiError:
    """Any exception as an ApiError. What is not meant for clients becomes a bare 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _from_validation(error)
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine is being restarted; try again", code="engine_restarting", retry_after=5)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "internal error; the server's log has the cause", code="internal_error")


def _from_validation(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    param = field_path(first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return bad_request(f"{param}: {message}" if param else message, param or None)


def field_path(parts: tuple) -> str:
    """('messages', 2, 'content') -> messages[2].content; keys that are no names and union branches are left out."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif str(part).isidentifier() and not (path and part in ("str", "int", "float", "bool")):
            path += f".{part}" if path else part
    return path
