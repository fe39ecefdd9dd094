"""The built-in chat page: a few files, no external resources, a strict content security policy."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

FOLDER = Path(__file__).resolve().parent.parent / "web"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/web/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/web/app.css": ("app.css", "text/css; charset=utf-8"),
    "/web/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path -> file and type; these paths need no API key (SPEC D2)."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """Routes of the page; the files are read once, here."""
    routes = APIRouter()
    for path, (name, media_type) in FILES.items():
        routes.add_api_route(path, _file((FOLDER / name).read_bytes(), media_type), include_in_schema=False)
    return routes


def _file(content: bytes, media_type: str):  # noqa: ANN202 (an endpoint; FastAPI reads the annotation)
    def send() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send
