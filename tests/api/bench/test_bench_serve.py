"""`fuseline bench serve`: workloads, definitions of the metrics, and a whole run against a small fake server."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from fuseline.api.bench import plot
from fuseline.api.bench.command import run_bench
from fuseline.api.bench.measure import Outcome, latencies, percentile, report, summarize
from fuseline.api.bench.workload import Vocabulary, WorkloadConfig, arrival_times, make_samples, pool_text
from fuseline.api.cli import main
from fuseline.api.config import ConfigError

VOCABULARY = Vocabulary(tuple(range(100, 200)), 1.25)


class FakeServer:
    """An OpenAI-compatible server in a thread: three chunks an answer, a count of the requests in flight."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        self.fail_from = math.inf
        self.text_field = "prompt"
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        text = (await request.json()).get(self.text_field, "")
        return web.json_response({"tokens": [300 + len(word) for word in text.split()]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if len(self.bodies) > self.fail_from:
            return web.json_response({"error": {"message": "no room"}}, status=503)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for text in ("", "one", "two", "three", ""):
            choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
            await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            await asyncio.sleep(0.002)
        usage = {"prompt_tokens": 7, "completion_tokens": 5}
        await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        self.in_flight -= 1
        return response


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    fake.start()
    yield fake
    fake.stop()


def test_random_prompts_have_exact_lengths_and_repeat() -> None:
    config = WorkloadConfig(num_prompts=5, input_len=40, output_len=9, seed=3)
    samples = make_samples(config, VOCABULARY, wants_ids=True)
    assert [len(sample.prompt) for sample in samples] == [40] * 5
    assert {sample.output_len for sample in samples} == {9}
    assert samples == make_samples(config, VOCABULARY, wants_ids=True)
    assert samples != make_samples(WorkloadConfig(num_prompts=5, input_len=40, seed=4), VOCABULARY, wants_ids=True)


def test_range_ratio_spreads_lengths_within_bounds() -> None:
    config = WorkloadConfig(num_prompts=200, input_len=100, output_len=10, range_ratio=0.5)
    lengths = {sample.input_len for sample in make_samples(config, VOCABULARY, wants_ids=True)}
    assert min(lengths) >= 50 and max(lengths) <= 150 and len(lengths) > 20


def test_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    config = WorkloadConfig("shared-prefix", num_prompts=4, input_len=16, prefix_len=32)
    prompts = [sample.prompt for sample in make_samples(config, VOCABULARY, wants_ids=True)]
    assert len({prompt[:32] for prompt in prompts}) == 1
    assert len({prompt[32:] for prompt in prompts}) == 4
    assert {len(prompt) for prompt in prompts} == {48}


def test_chat_lengths_vary_around_the_median() -> None:
    config = WorkloadConfig("chat", num_prompts=999, input_len=100, output_len=50)
    lengths = sorted(sample.input_len for sample in make_samples(config, VOCABULARY, wants_ids=False))
    assert 85 < lengths[499] < 115
    assert lengths[0] < 40 and 250 < lengths[-1] <= 800


def test_text_prompts_count_words_by_tokens_per_word() -> None:
    sample = make_samples(WorkloadConfig(num_prompts=1, input_len=50), VOCABULARY, wants_ids=False)[0]
    assert len(sample.prompt.split()) == 40
    assert len(pool_text(0).split()) == 4096


def test_arrival_times() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]
    times = arrival_times(4000, 10.0, 1.0, 0)
    assert times[0] == 0 and list(times) == sorted(times)
    assert times[-1] / 3999 == pytest.approx(0.1, rel=0.1)


def test_percentile_interpolates_linearly() -> None:
    values = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert [percentile(values, percent) for percent in (0, 50, 90, 100)] == [10.0, 30.0, 46.0, 50.0]
    assert percentile([], 50) == 0.0


def test_summary_follows_the_definitions() -> None:
    good = Outcome(10, output_len=5, ttft=0.1, latency=0.5, itls=[0.1, 0.1, 0.2])
    single = Outcome(20, output_len=1, ttft=0.3, latency=0.3)
    failed = Outcome(99, output_len=9, ttft=9.0, latency=9.0, error="503")
    result = summarize([good, single, failed], duration=2.0)
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 6)
    assert (result["request_throughput"], result["output_throughput"], result["total_token_throughput"]) == (1, 3, 18)
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["mean_tpot_ms"] == pytest.approx(100)
    assert result["median_itl_ms"] == pytest.approx(100)
    assert result["p99_e2el_ms"] == pytest.approx(300 + 0.99 * 200)
    assert latencies([failed])["ttft"] == []
    assert "6" in report(result) and "Inter-token latency" in report(result)


def test_run_against_a_server(server: FakeServer, tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    arguments = ["bench", "serve", "--base-url", server.url, "--num-prompts", "12", "--random-input-len", "6",
                 "--random_output_len=4", "--max-concurrency", "3", "--ignore-eos", "--disable-tqdm",
                 "--save-result", str(file), "--num-warmups", "2"]  # fmt: skip
    assert main(arguments) == 0
    assert len(server.bodies) == 14
    assert server.most_in_flight == 3
    body = server.bodies[-1]
    assert body["model"] == "fake" and body["ignore_eos"] and body["max_tokens"] == 4 and body["stream"]
    assert len(body["prompt"]) == 6 and all(token > 300 for token in body["prompt"])
    result = json.loads(file.read_text())
    assert result["completed"] == 12 and result["total_output_tokens"] == 60 and result["total_input_tokens"] == 84
    assert [len(itls) for itls in result["itls"]] == [2] * 12
    assert result["mean_e2el_ms"] > result["mean_ttft_ms"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert "request throughput" in capsys.readouterr().out


@pytest.mark.parametrize("field, has_ids", [("content", True), ("none", False)])
def test_other_servers_name_the_text_differently(server: FakeServer, field: str, has_ids: bool) -> None:
    server.text_field = field
    assert main(["bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--disable-tqdm"]) == 0
    assert isinstance(server.bodies[-1]["prompt"], list) == has_ids


def test_chat_endpoint(server: FakeServer, capsys) -> None:
    arguments = ["serve", "--base-url", server.url, "--endpoint", "/v1/chat/completions",
                 "--num-prompts", "2", "--num-warmups", "0", "--random-input-len", "5",
                 "--disable-tqdm", "--request-rate", "999"]  # fmt: skip
    assert run_bench(arguments) == 0
    assert server.bodies[0]["messages"][0]["role"] == "user"
    assert "ignore_eos" not in server.bodies[0]
    assert "2 done, 0 failed" in capsys.readouterr().out


def test_further_fields_reach_each_request(server: FakeServer) -> None:
    arguments = ["serve", "--base-url", server.url, "--num-prompts", "2", "--disable-tqdm"]
    assert run_bench([*arguments, "--extra-body", '{"logprobs": 5, "temperature": 1.5}']) == 0
    assert [(body["logprobs"], body["temperature"]) for body in server.bodies] == [(5, 1.5)] * 3


@pytest.mark.parametrize("text, message", [("{", "is no JSON"), ("[1]", "must be a JSON object, not list")])
def test_further_fields_that_are_no_object_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--extra-body {message}"):
        run_bench(["serve", "--num-prompts", "2", "--extra-body", text])


def test_failures_are_counted_and_shown(server: FakeServer, capsys) -> None:
    server.fail_from = 2
    arguments = ["serve", "--base-url", server.url, "--num-prompts", "4", "--num-warmups", "1", "--disable-tqdm"]
    assert run_bench(arguments) == 1
    out = capsys.readouterr().out
    assert "1 done, 3 failed" in out and "503" in out and "no room" in out


def test_errors_are_one_line(server: FakeServer, capsys, monkeypatch) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "is the server up?" in capsys.readouterr().err
    assert main(["bench", "serve", "--num-prompts", "0"]) == 1
    assert main(["bench", "serve", "--save-result", "/no/such/file"]) == 1
    assert "no directory /no/such" in capsys.readouterr().err
    server.fail_from = 0
    assert main(["bench", "serve", "--base-url", server.url, "--disable-tqdm"]) == 1
    assert "warm-up" in capsys.readouterr().err.splitlines()[-1]

    def missing() -> None:
        raise ConfigError("--plot needs matplotlib: pip install 'fuseline[plot]'")

    monkeypatch.setattr("fuseline.api.bench.command.require_matplotlib", missing)
    assert main(["bench", "serve", "--plot", "x.png"]) == 1
    assert "fuseline[plot]" in capsys.readouterr().err


def test_missing_matplotlib_is_said(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install"):
        plot.require_matplotlib()


def test_bench_alone_lists(capsys) -> None:
    assert main(["bench"]) == 0
    assert "fuseline bench serve" in capsys.readouterr().out
