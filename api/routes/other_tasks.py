"""Routes of tasks that the served model does not do (SPEC 1.3): each answers 400 and says so."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.errors import bad_request

ROUTES: dict[str, tuple[str, ...]] = {
    "Embeddings": ("/v1/embeddings",),
    "Pooling": ("/pooling",),
    "Classification": ("/classify",),
    "Score": ("/score", "/v1/score"),
    "Rerank (Score)": ("/rerank", "/v1/rerank", "/v2/rerank"),
    "Transcriptions": ("/v1/audio/transcriptions",),
    "Translations": ("/v1/audio/translations",),
    "Speech": ("/v1/audio/speech",),
    "Images": ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations"),
    "Moderations": ("/v1/moderations",),
}
"""Name of an API -> its routes. A model that generates text does none of them."""


def router() -> APIRouter:
    routes = APIRouter()
    for name, paths in ROUTES.items():
        for path in paths:
            routes.add_api_route(path, _refuser(name), methods=["POST"], include_in_schema=False)
    return routes


def _refuser(name: str):  # noqa: ANN202 (an endpoint; FastAPI reads the annotation)
    async def refuse(request: Request) -> Response:
        raise bad_request(f"The model does not support {name} API", None, "unsupported_value")

    return refuse
