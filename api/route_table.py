"""Paths and methods of an application, for the log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def route_table(app: Any) -> list[tuple[str, list[str]]]:
    """(path, methods) of every route in the order in which they are tried; one line for each path."""
    table: dict[str, set[str]] = {}
    for path, methods in _walk(app.routes, ""):
        table.setdefault(path, set()).update(methods | ({"HEAD"} if "GET" in methods else set()))
    return [(path, sorted(methods)) for path, methods in table.items()]


def _walk(routes: Any, prefix: str) -> Iterator[tuple[str, set[str]]]:
    """Routes with a path of their own, also those inside mounts and inside routers that FastAPI keeps whole."""
    for route in routes:
        path = getattr(route, "path", None)
        context = getattr(route, "include_context", None)
        inner = getattr(getattr(route, "original_router", route), "routes", None)
        if inner is not None:
            yield from _walk(inner, prefix + (path or getattr(context, "prefix", "") or ""))
        elif path is not None:
            yield prefix + path, set(getattr(route, "methods", None) or ())
