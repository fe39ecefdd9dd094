"""Spans of requests, received over OTLP: the attributes of the reference server, W3C parents, times of steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from otlp_receiver import Received, attributes, grpc_receiver, http_receiver
from python_process import run_python

from fuseline.api.app import build_app
from fuseline.api.cli import main
from fuseline.api.config import read_environment
from fuseline.api.config_resolve import resolve
from fuseline.api.llm import LLM
from fuseline.api.served import Served

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "congo=t61rcWkgMzE"}
IDS: dict[str, Any] = {"prompt": [3, 4, 5], "max_tokens": 4, "ignore_eos": True}
HTTP = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Received]:
    with grpc_receiver() as received:
        yield received


@pytest.fixture(scope="module")
def llm(receiver: Received) -> Iterator[LLM]:
    flags = {"otlp_traces_endpoint": receiver.endpoint, "collect_detailed_traces": "all", "prompt_workers": 0}
    with LLM("demo", show_progress=False, max_num_seqs=8, **flags) as opened:
        yield opened


def call(llm: LLM, app: Any, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body, headers=headers)

    return llm._call(send())


def spans(app: Any, receiver: Received) -> list[Any]:
    served: Served = app.state.served
    assert served.tracer._provider.force_flush(5000)
    return receiver.spans()


def test_a_span_of_a_request(llm: LLM, receiver: Received) -> None:
    spans(llm._app, receiver)
    begin = time.time_ns()
    body = {**IDS, "temperature": 0.5, "top_p": 0.75, "n": 2, "seed": 1}
    answer = call(llm, llm._app, "/v1/completions", body, **HEADERS).json()
    served: Served = llm._app.state.served
    assert served.tracer._provider.force_flush(5000) and receiver.services() == {"fuseline"}
    (span,) = receiver.spans()
    assert (span.name, span.kind, span.trace_state) == ("llm_request", span.SPAN_KIND_SERVER, HEADERS["tracestate"])
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert begin <= span.start_time_unix_nano < span.end_time_unix_nano <= time.time_ns()
    found = attributes(span)
    latencies = {name.rpartition(".")[2]: found.pop(name) for name in list(found) if ".latency." in name}
    assert found == {
        "gen_ai.request.id": answer["id"], "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.75,
        "gen_ai.request.max_tokens": 4, "gen_ai.request.n": 2, "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.prompt_tokens": 3, "gen_ai.usage.completion_tokens": 8, "gen_ai.response.model": "demo",
        "gen_ai.response.finish_reasons": ["length", "length"],
    }  # fmt: skip
    total = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert latencies["e2e"] == pytest.approx(total, abs=1e-3)
    for name in ("time_in_queue", "time_to_first_token", "time_in_model_prefill", "time_in_model_decode"):
        assert 0 <= latencies[name] <= total
    assert 0 < latencies["time_in_model_forward"] < latencies["time_in_model_execute"]
    assert latencies["time_in_model_execute"] <= latencies["time_in_model_inference"] + 0.05 <= total + 0.05


def test_every_prompt_has_a_span_of_its_own(llm: LLM, receiver: Received) -> None:
    spans(llm._app, receiver)
    answer = call(llm, llm._app, "/v1/completions", {**IDS, "prompt": [[3], [4, 5]]}).json()
    found = {attributes(span)["gen_ai.request.id"]: span for span in spans(llm._app, receiver)}
    assert set(found) == {f"{answer['id']}-0", f"{answer['id']}-1"}
    assert not any(span.parent_span_id for span in found.values())
    assert len({span.trace_id for span in found.values()}) == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_every_route_has_spans(llm: LLM, receiver: Received, path: str) -> None:
    fields = {"input": "Hi"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "Hi"}]}
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    for stream in (False, True):
        spans(llm._app, receiver)
        answer = call(llm, llm._app, path, {"model": "demo", **fields, limit: 2, "stream": stream}, **HEADERS)
        assert answer.status_code == 200, answer.text
        (span,) = spans(llm._app, receiver)
        assert span.parent_span_id.hex() == PARENT and attributes(span)["gen_ai.usage.completion_tokens"] == 2


def test_failed_and_refused_requests(llm: LLM, receiver: Received) -> None:
    spans(llm._app, receiver)
    assert call(llm, llm._app, "/v1/completions", {**IDS, "temperature": -1}, **HEADERS).status_code == 400
    assert not spans(llm._app, receiver)  # it never was in the engine
    wrong = {**IDS, "guided_grammar": 'root ::= nothing'}
    assert call(llm, llm._app, "/v1/completions", wrong, **HEADERS).status_code == 400
    (span,) = spans(llm._app, receiver)
    found = attributes(span)
    assert span.status.code == span.status.STATUS_CODE_ERROR and found["gen_ai.response.finish_reasons"] == ["error"]
    assert not any("first_token" in name for name in found)
    for header in ("nonsense", "00-" + "0" * 32 + f"-{PARENT}-01", "00" * 999, ""):
        assert call(llm, llm._app, "/v1/completions", IDS, traceparent=header).status_code == 200
        (span,) = spans(llm._app, receiver)
        assert not span.parent_span_id


def test_times_of_steps_are_metrics(llm: LLM) -> None:
    call(llm, llm._app, "/v1/completions", IDS)

    async def scrape() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(llm._app), base_url="http://test") as client:
            return (await client.get("/metrics")).text

    text = llm._call(scrape())
    for name in ("model_forward_time_milliseconds", "model_execute_time_milliseconds"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"fuseline:{name}_sum")]
        assert float(line.split()[-1]) > 0


def test_over_http(llm: LLM) -> None:
    with http_receiver() as received:
        flags = {"model": "demo", "otlp_traces_endpoint": received.endpoint, "prompt_workers": 0}
        config = resolve(flags, read_environment(HTTP))
        app = build_app(config, llm._app.state.served.client, llm.ready, llm._app.state.served.tokenizer)
        assert call(llm, app, "/v1/completions", IDS, **HEADERS).status_code == 200
        app.state.served.tracer.close()  # sends what is left
        (span,) = received.spans()
        assert span.parent_span_id.hex() == PARENT


def test_a_server_without_tracing_says_so_once(llm: LLM, caplog) -> None:
    config = resolve({"model": "demo", "prompt_workers": 0})
    app = build_app(config, llm._app.state.served.client, llm.ready, llm._app.state.served.tokenizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert call(llm, app, "/v1/completions", IDS, **HEADERS).status_code == 200
    assert [record.message for record in caplog.records].count(
        "a request came with trace headers, but no spans are written: see --otlp-traces-endpoint"
    ) == 1  # fmt: skip


def test_a_collector_that_is_not_there_changes_no_answer(llm: LLM) -> None:
    config = resolve({"model": "demo", "prompt_workers": 0, "otlp_traces_endpoint": "http://127.0.0.1:9"})
    app = build_app(config, llm._app.state.served.client, llm.ready, llm._app.state.served.tokenizer)
    assert call(llm, app, "/v1/completions", IDS).status_code == 200
    begin = time.monotonic()
    app.state.served.tracer.close()
    assert time.monotonic() - begin < 4


def test_what_the_settings_lack_is_told(monkeypatch, capsys) -> None:
    start = ["serve", "demo", "--print-config", "--otlp-traces-endpoint"]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    assert main([*start, "localhost:4317"]) == 1 and "must begin with http://" in capsys.readouterr().err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "smoke")
    assert main([*start, "http://a:1"]) == 1 and "'smoke'; use one of grpc, http/protobuf" in capsys.readouterr().err


def test_without_the_packages_one_line_says_what_to_install() -> None:
    found = run_python(
        "import io, sys\n"
        "from contextlib import redirect_stderr\n"
        "sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry'] = None\n"
        "from fuseline.api.cli import main\n"
        "with redirect_stderr(io.StringIO()) as told:\n"
        "    status = main(['serve', 'demo', '--otlp-traces-endpoint', 'http://127.0.0.1:1', '--print-config'])\n"
        "print(status, told.getvalue(), end='')"
    )
    assert found.startswith("1 fuseline: error: --otlp-traces-endpoint") and "\n" not in found
    assert "pip install 'fuseline[tracing]'" in found
