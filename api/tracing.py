"""OpenTelemetry: one span a prompt, with the attributes of the reference server (SPEC 18, 20.9).

Its parent is the span that the request's W3C headers name. Spans are sent in the background, as OTLP over gRPC or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from threading import Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fuseline.api.config import ConfigError, ServerConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from fuseline.api.metrics import FinishedRequest
    from fuseline.engine.messages import EngineRequest

HEADERS = ("traceparent", "tracestate")
"""W3C Trace Context."""
MAX_HEADER = 512
"""Characters of a header that are taken, as W3C asks for."""
EXPORTERS = MappingProxyType({
    "grpc": "opentelemetry.exporter.otlp.proto.grpc", "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
})  # fmt: skip
"""Value of $OTEL_EXPORTER_OTLP_TRACES_PROTOCOL -> package."""
CURE = "OpenTelemetry is not installed: pip install 'fuseline[tracing]'"
FLUSH_SECONDS = 2.0
"""What a server that ends waits for its last spans."""


def find_trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of W3C Trace Context among the headers of a request; a server without tracing has no use for them."""
    return {name: value for name in HEADERS if (value := headers.get(name)) and len(value) <= MAX_HEADER}


def why_not(endpoint: str, protocol: str) -> str:
    """Why no spans can be sent there; empty if they can."""
    if protocol not in EXPORTERS:
        return f"$OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is {protocol!r}; use one of {', '.join(EXPORTERS)}"
    if protocol != "grpc" and not endpoint.startswith(("http://", "https://")):
        return "over HTTP it must begin with http:// or https:// (http://localhost:4318/v1/traces)"
    return "" if _is_installed("opentelemetry.sdk") and _is_installed(EXPORTERS[protocol]) else CURE


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it is missing
        return False


def open_tracer(config: ServerConfig) -> Tracer | None:
    """None without --otlp-traces-endpoint. Raises ConfigError."""
    if not config.otlp_traces_endpoint:
        return None
    if reason := why_not(config.otlp_traces_endpoint, config.otlp_protocol):
        raise ConfigError(f"--otlp-traces-endpoint: {reason}")
    try:
        return Tracer(_exporter(config.otlp_traces_endpoint, config.otlp_protocol), config.served_model_name[0])
    except Exception as error:  # the exporter reads variables of its own, and files that they name
        raise ConfigError(f"--otlp-traces-endpoint: {' '.join(str(error).split())}") from error


def _exporter(endpoint: str, protocol: str) -> SpanExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=endpoint)


class Tracer:
    """Writes spans. Its provider is its own: nothing global of OpenTelemetry is set."""

    def __init__(self, exporter: SpanExporter, model: str) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = Resource({"service.name": "fuseline"}).merge(OTELResourceDetector().detect())
        self._exporter = exporter
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fuseline.llm_engine")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def write(
        self, request: EngineRequest, label: str, headers: Mapping[str, str], finished: FinishedRequest
    ) -> None:
        """The span of a request that ends now."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now = time.time()
        span = self._tracer.start_span(
            "llm_request", context=self._propagator.extract(headers), kind=SpanKind.SERVER,
            start_time=int(finished.arrival * 1e9), attributes=self._attributes(request, label, finished, now),
        )  # fmt: skip
        if "error" in finished.reasons:
            span.set_status(Status(StatusCode.ERROR))
        span.end(int(now * 1e9))

    def _attributes(self, request: EngineRequest, label: str, finished: FinishedRequest, now: float) -> dict[str, Any]:
        params = request.params
        found: dict[str, Any] = {
            "gen_ai.response.model": self._model,
            "gen_ai.response.finish_reasons": tuple(finished.reasons),
            "gen_ai.request.id": label,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.n": params.n,
            "gen_ai.usage.num_sequences": params.n,
            "gen_ai.usage.prompt_tokens": finished.num_prompt,
            "gen_ai.usage.completion_tokens": finished.num_generated,
            "gen_ai.latency.e2e": now - finished.arrival,
        }
        return found | {f"gen_ai.latency.{name}": seconds for name, seconds in _latencies(finished).items()}

    def close(self) -> None:
        """Send what is left, for FLUSH_SECONDS at most. No span is written afterwards."""
        # In a thread of its own: a collector that does not answer is tried for longer than a flush is told to take.
        flush = Thread(target=self._provider.force_flush, daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)
        self._exporter.shutdown()
        self._provider.shutdown()


def _latencies(finished: FinishedRequest) -> dict[str, float]:
    """Seconds; what a request that was refused or aborted has not come to is left out."""
    found: dict[str, float] = {}
    if finished.queue_seconds is None:
        return found
    scheduled = finished.arrival + finished.queue_seconds
    found["time_in_queue"] = finished.queue_seconds
    if finished.first_token is not None:
        last = max(finished.last.values())
        found["time_to_first_token"] = finished.first_token - finished.arrival
        found["time_in_model_prefill"] = max(finished.first_token - scheduled, 0.0)
        found["time_in_model_decode"] = last - finished.first_token
        found["time_in_model_inference"] = max(last - scheduled, 0.0)
    times = finished.times
    measured = {"time_in_model_forward": times.forward, "time_in_model_execute": times.execute}
    return found | {name: seconds for name, seconds in measured.items() if seconds is not None}
