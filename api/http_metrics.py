"""Metrics of HTTP requests by route, and of the process; they have no prefix and no model name."""

from __future__ import annotations

import time

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
OTHER = "none"
"""Label of everything that a client can make up: a series for each would fill the memory."""


class HttpMetrics:
    """All series of one server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        names = ("handler", "method")
        self._requests = Counter(
            "http_requests", "Answered requests by route, method and class of status", (*names, "status"),
            registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "http_request_duration_seconds", "From a request's head to the end of its answer", names,
            registry=registry, buckets=BUCKETS,
        )  # fmt: skip
        self._received = Summary("http_request_size_bytes", "Announced size of bodies", ("handler",), registry=registry)
        self._sent = Summary("http_response_size_bytes", "Size of answers' bodies", ("handler",), registry=registry)

    def take(self, scope: Scope, status: int, seconds: float, num_sent: int) -> None:
        """Count one answered request."""
        handler = getattr(scope.get("route"), "path", OTHER)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._seconds.labels(handler, method).observe(seconds)
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self._received.labels(handler).observe(int(announced) if announced.isdigit() else 0)
        self._sent.labels(handler).observe(num_sent)


class HttpMetricsMiddleware:
    """Counts what passes through it, when its answer ends. A request without an answer counts as 5xx."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begin = time.perf_counter()
        status, num_sent = 500, 0

        async def counted(message: Message) -> None:
            nonlocal status, num_sent
            if message["type"] == "http.response.start":
                status = message["status"]
            num_sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.take(scope, status, time.perf_counter() - begin, num_sent)
