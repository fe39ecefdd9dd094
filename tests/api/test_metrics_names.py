"""Every series of SPEC 18: its name, its type, its labels and its buckets, on a server of the bundled model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_client import MESSAGES, Api
from prometheus_client.parser import text_string_to_metric_families

LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60)
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
GAUGES = (
    "num_requests_running", "num_requests_waiting", "num_requests_swapped", "gpu_cache_usage_perc",
    "kv_cache_usage_perc", "cpu_cache_usage_perc", "gpu_prefix_cache_hit_rate", "cpu_prefix_cache_hit_rate",
    "spec_decode_draft_acceptance_rate", "spec_decode_efficiency",
)  # fmt: skip
COUNTERS = (
    "prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens", "tokens",
    "prompt_tokens_cached", "spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens",
    "spec_decode_num_emitted_tokens",
)  # fmt: skip
HISTOGRAMS = {
    "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8096),
    "time_to_first_token_seconds": TTFT,
    "time_per_output_token_seconds": TPOT, "inter_token_latency_seconds": TPOT,
    "e2e_request_latency_seconds": LATENCY, "request_queue_time_seconds": LATENCY, "time_in_queue_requests": LATENCY,
    "request_inference_time_seconds": LATENCY, "request_prefill_time_seconds": LATENCY,
    "request_decode_time_seconds": LATENCY,
    "request_prompt_tokens": LENGTHS, "request_generation_tokens": LENGTHS, "request_params_max_tokens": LENGTHS,
    "request_max_num_generation_tokens": LENGTHS,
    "request_params_n": (1, 2, 5, 10, 20),
    "request_num_preemptions": (0, 1, 2, 5, 10, 20, 50),
    "kv_block_lifetime_seconds": (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800),
}  # fmt: skip


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    opened = Api(metrics_prefix="vllm:")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def families(api: Api) -> dict:
    api.answer("/v1/chat/completions", messages=MESSAGES, max_tokens=3)
    return read(api)


def read(api: Api) -> dict:
    return {family.name: family for family in text_string_to_metric_families(api.call("GET", "/metrics").text)}


def value(api: Api, name: str, **labels: str) -> float:
    samples = (sample for family in read(api).values() for sample in family.samples)
    return next((s.value for s in samples if s.name == name and s.labels == labels), 0.0)


@pytest.mark.parametrize("name", GAUGES)
def test_gauges(families: dict, name: str) -> None:
    family = families[f"vllm:{name}"]
    assert family.type == "gauge" and [s.labels for s in family.samples] == [{"model_name": "demo"}]


@pytest.mark.parametrize("name", COUNTERS)
def test_counters(families: dict, name: str) -> None:
    family = families[f"vllm:{name}"]
    totals = [s for s in family.samples if s.name == f"vllm:{name}_total"]
    assert family.type == "counter" and [s.labels for s in totals] == [{"model_name": "demo"}]


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms(families: dict, name: str) -> None:
    family = families[f"vllm:{name}"]
    buckets = [s.labels for s in family.samples if s.name.endswith("_bucket")]
    assert family.type == "histogram" and all(labels.keys() == {"model_name", "le"} for labels in buckets)
    assert tuple(float(labels["le"]) for labels in buckets) == (*HISTOGRAMS[name], float("inf"))


def test_labels(families: dict) -> None:
    def labels(name: str, label: str) -> set[str]:
        return {s.labels[label] for s in families[f"vllm:{name}"].samples if not s.name.endswith("_created")}

    assert labels("request_success", "finished_reason") == {"stop", "length", "abort", "error"}
    assert labels("num_requests_waiting_by_reason", "reason") == {"capacity", "deferred", "asleep"}
    assert labels("engine_sleep_state", "sleep_state") == {"awake", "paused", "weights_offloaded", "discard_all"}


def test_cache_config(api: Api, families: dict) -> None:
    (info,) = families["vllm:cache_config_info"].samples
    assert info.value == 1
    assert info.labels.items() >= {
        ("block_size", "16"), ("cache_dtype", "bfloat16"), ("enable_prefix_caching", "True"), ("num_cpu_blocks", "0"),
        ("gpu_memory_utilization", "0.9"), ("num_gpu_blocks_override", "None"), ("preemption_mode", "recompute"),
    }  # fmt: skip
    assert int(info.labels["num_gpu_blocks"]) > 0 and float(info.labels["swap_space"]) >= 0


ROUTES = [
    ("POST", "/v1/completions", "/v1/completions", {"prompt": "x", "max_tokens": 1}, "2xx"),
    ("POST", "/v1/completions", "/v1/completions", {"prompt": "x", "top_p": 2}, "4xx"),
    ("POST", "/v1/completions", "/v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True}, "2xx"),
    ("GET", "/v1/models/demo", "/v1/models/{name:path}", None, "2xx"),
    ("GET", "/v1/models/nobody", "/v1/models/{name:path}", None, "4xx"),
    ("HEAD", "/health", "/health", None, "2xx"),
    ("GET", "/made/up", "none", None, "4xx"),
    ("MADEUP", "/made/up", "none", None, "4xx"),
]


@pytest.mark.parametrize("method, path, handler, body, status", ROUTES)
def test_requests_by_route_and_status(
    api: Api, method: str, path: str, handler: str, body: dict | None, status: str
) -> None:
    labels = {"handler": handler, "method": "none" if method == "MADEUP" else method}

    def counts() -> tuple[float, ...]:
        return (
            value(api, "http_requests_total", **labels, status=status),
            value(api, "http_request_duration_seconds_count", **labels),
            value(api, "http_request_size_bytes_sum", handler=handler),
            value(api, "http_response_size_bytes_sum", handler=handler),
        )

    before = counts()
    response = api.call(method, path, body)
    received, sent = len(response.request.content), len(response.content)
    assert [b - a for a, b in zip(before, counts(), strict=True)] == [1, 1, received, sent]


def test_the_process(families: dict) -> None:
    for name in ("process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds", "python_info"):
        assert families[name].samples[-1].value > 0, name


def test_without_statistics_only_http_and_process_are_left() -> None:
    opened = Api(disable_log_stats=True)
    try:
        opened.call("GET", "/health")
        assert value(opened, "http_requests_total", handler="/health", method="GET", status="2xx") == 1
        found = read(opened)
        assert "process_cpu_seconds" in found and not any(":" in name for name in found)
    finally:
        opened.close()
