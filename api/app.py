"""The FastAPI application around one served model."""

from __future__ import annotations

import inspect
import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

import fuseline
from fuseline.api.config import ServerConfig
from fuseline.api.errors import ApiError, to_api_error
from fuseline.api.http_metrics import HttpMetricsMiddleware
from fuseline.api.middleware import (
    HeadMiddleware,
    KeyMiddleware,
    PaceMiddleware,
    RefusalMiddleware,
    RequestIdMiddleware,
    load_middleware,
)
from fuseline.api.openapi import describe
from fuseline.api.output.anthropic_messages import error_body
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.routes import (
    anthropic,
    chat,
    completions,
    invocations,
    operation,
    other_tasks,
    responses,
    tokenizer,
    web,
)
from fuseline.api.served import build_served, load_tokenizer
from fuseline.engine.client import EngineClient, EngineDeadError
from fuseline.engine.messages import EngineReady

LOG = logging.getLogger("fuseline.http")


class Application(FastAPI):
    """FastAPI answers unexpected errors outside of its middleware; what every answer carries is outside of that."""

    def __init__(self, config: ServerConfig, **options) -> None:
        super().__init__(**options)
        self._config = config

    def openapi(self) -> dict:
        if self.openapi_schema is None:
            self.openapi_schema = describe(self)
        return self.openapi_schema

    def build_middleware_stack(self) -> ASGIApp:
        config = self._config
        stack: ASGIApp = RefusalMiddleware(HeadMiddleware(super().build_middleware_stack()))
        stack = CORSMiddleware(
            stack, allow_origins=config.allowed_origins, allow_credentials=config.allow_credentials,
            allow_methods=config.allowed_methods, allow_headers=config.allowed_headers,
        )  # fmt: skip
        if config.enable_request_id_headers:
            stack = RequestIdMiddleware(stack)
        served = self.state.served
        return PaceMiddleware(HttpMetricsMiddleware(stack, served.http_metrics), served.turns)


def build_app(
    config: ServerConfig, client: EngineClient, ready: EngineReady, loaded: TextTokenizer | None = None
) -> FastAPI:
    """`loaded`: of load_tokenizer, where it has been loaded already.

    Raises ConfigError for a tokenizer, template or middleware that cannot be used.
    """
    docs = {} if not config.disable_fastapi_docs else {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = Application(config, title="fuseline", version=fuseline.__version__, root_path=config.root_path, **docs)
    app.state.served = build_served(config, client, ready, loaded or load_tokenizer(config))
    app.state.unknown_fields = set()
    own = (
        operation.router, completions.router, chat.router, responses.router, anthropic.router, invocations.router,
        tokenizer.router,
    )  # fmt: skip
    for routes in (*own, other_tasks.router(), web.router()):
        app.include_router(routes)
    if config.enable_tokenizer_info_endpoint:
        app.include_router(tokenizer.info_router)
    if config.dev_mode:
        app.include_router(operation.dev_router)
    for kind in (ApiError, EngineDeadError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_incomplete)
    _add_middleware(app, config)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    mapped = to_api_error(error)
    if request.app.state.served.config.log_error_stack:
        LOG.error("%s %s: %s", request.method, request.url.path, mapped, exc_info=error)
    if mapped.code == "internal_error" and not isinstance(error, ApiError):
        LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    if request.url.path.startswith("/v1/messages"):  # that API has an error body of its own
        return JSONResponse(error_body(mapped), mapped.status, mapped.response_headers())
    return mapped.response()


async def _answer_incomplete(request: Request, error: Exception) -> Response:
    """The body did not come: the client has left (nobody reads this), or the connection has refused it."""
    refusal: ApiError | None = getattr(request.state, "refusal", None)
    return Response(status_code=499) if refusal is None else refusal.response()


def _add_middleware(app: FastAPI, config: ServerConfig) -> None:
    """The last one added is the outermost; around them is what Application adds."""
    for path in config.middleware:
        _add_custom(app, path)
    if config.api_key:
        app.add_middleware(KeyMiddleware, keys=config.api_key, root_path=config.root_path)


def _add_custom(app: FastAPI, path: str) -> None:
    found = load_middleware(path)
    if inspect.isclass(found):
        app.add_middleware(found)
    else:
        app.add_middleware(BaseHTTPMiddleware, dispatch=found)
