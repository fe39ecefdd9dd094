"""Receivers of OTLP spans in this process: gRPC and HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Received:
    """What has come in; `endpoint` is where it goes."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.requests: list[ExportTraceServiceRequest] = []

    def spans(self) -> list[Span]:
        """Taken out."""
        found = [span for one in self.requests for r in one.resource_spans for s in r.scope_spans for span in s.spans]
        self.requests.clear()
        return found

    def services(self) -> set[str]:
        return {attributes(r.resource)["service.name"] for one in self.requests for r in one.resource_spans}


def attributes(holder: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in holder.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def grpc_receiver() -> Iterator[Received]:
    server = grpc.server(ThreadPoolExecutor(2))
    received = Received(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")

    class Servicer(TraceServiceServicer):
        def Export(self, request, context):  # noqa: N802
            received.requests.append(request)
            return ExportTraceServiceResponse()

    add_TraceServiceServicer_to_server(Servicer(), server)
    server.start()
    try:
        yield received
    finally:
        server.stop(None)


@contextmanager
def http_receiver() -> Iterator[Received]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = ExportTraceServiceRequest()
            request.ParseFromString(body)
            received.requests.append(request)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received = Received(f"http://127.0.0.1:{server.server_port}/v1/traces")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
