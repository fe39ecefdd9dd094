"""/openapi.json: bodies are parsed by our own code, so FastAPI is told here what they hold."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from fuseline.api.protocol.anthropic import CountTokensRequest, MessagesRequest
from fuseline.api.protocol.chat import ChatRequest, DetokenizeRequest, TokenizeRequest
from fuseline.api.protocol.completion import CompletionRequest
from fuseline.api.protocol.errors import ErrorBody
from fuseline.api.protocol.responses import ResponsesRequest

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
"""Route -> the JSON body of its POST."""
EITHER = {"/invocations": (ChatRequest, CompletionRequest)}
"""Route -> the bodies that it takes."""
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations")
REFERENCE = "#/components/schemas/{model}"


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of an application, with the bodies of its requests and errors. Made once."""
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _add(schemas, ErrorBody)
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            responses.pop("422", None)  # what FastAPI would answer to a body that it had parsed
            kinds = EITHER.get(path) or ((BODIES[path],) if path in BODIES else ())
            if kinds and method == "post":
                operation["requestBody"] = {"required": True, "content": _json(*kinds)}
            for kind in kinds:
                _add(schemas, kind)
            if path in STREAMED:
                responses["200"]["content"] = {"application/json": {}, "text/event-stream": {}}
            responses["default"] = {"description": "Refused or failed", "content": _json(ErrorBody)}
    return made


def _json(*kinds: type[BaseModel]) -> dict[str, Any]:
    references = [{"$ref": REFERENCE.format(model=kind.__name__)} for kind in kinds]
    return {"application/json": {"schema": references[0] if len(kinds) == 1 else {"anyOf": references}}}


def _add(schemas: dict[str, Any], kind: type[BaseModel]) -> None:
    """Put the schema of a body, and those that it refers to, among the document's."""
    schema = kind.model_json_schema(ref_template=REFERENCE)
    schemas |= schema.pop("$defs", {})
    schemas[kind.__name__] = schema
