"""`fuseline serve` as a user meets it: the bundled model in real processes, driven by the OpenAI SDK."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest
from serve_cases import BIN, server, url

__all__ = ["url"]


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, question: str, **kwargs) -> str:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=40, **kwargs
    )
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content


def test_models_lists_the_demo(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["demo"]


def test_the_demo_knows_a_capital(client: openai.OpenAI) -> None:
    assert "Paris" in ask(client, "What is the capital of France?")


def test_streamed_answer_equals_the_whole_one(client: openai.OpenAI) -> None:
    whole = ask(client, "What is the capital of Italy?")
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What is the capital of Italy?"}], temperature=0,
        max_tokens=40, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices
    assert len([c for c in chunks if c.choices]) > 3


def test_seeded_sampling_repeats_and_differs_by_seed(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        done = client.completions.create(
            model="demo", prompt="Once upon a time", max_tokens=24, temperature=1.0, seed=seed,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return done.choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_metrics_count_the_tokens(client: openai.OpenAI, url: str) -> None:
    def generated() -> float:
        text = httpx.get(f"{url}/metrics").text
        return float(re.search(r"^fuseline:generation_tokens_total\{[^}]*\} (\S+)", text, re.M).group(1))

    before = generated()
    done = client.completions.create(model="demo", prompt="The sky is", max_tokens=7, extra_body={"ignore_eos": True})
    assert done.usage.completion_tokens == 7
    assert generated() - before == 7


def test_disconnect_frees_the_request(client: openai.OpenAI, url: str) -> None:
    stream = client.completions.create(
        model="demo", prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        text = httpx.get(f"{url}/metrics").text
        aborted = re.search(r'^fuseline:request_success_total\{[^}]*finished_reason="abort"[^}]*\} (\S+)', text, re.M)
        running = re.search(r"^fuseline:num_requests_running\{[^}]*\} (\S+)", text, re.M)
        if aborted and float(aborted.group(1)) >= 1 and float(running.group(1)) == 0:
            return
        time.sleep(0.05)
    raise AssertionError("the abandoned request still runs")


def test_bad_requests_name_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hi"}], temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"


def test_the_page_is_served(url: str) -> None:
    page = httpx.get(url + "/")
    assert page.status_code == 200 and "text/html" in page.headers["content-type"]


def test_one_process_answers_the_same(tmp_path: Path, client: openai.OpenAI) -> None:
    with server(tmp_path, "--disable-frontend-multiprocessing") as (address, _):
        single = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        question = "What is 2 + 3?"
        assert ask(single, question) == ask(client, question)


def test_a_busy_port_is_one_line(url: str, tmp_path: Path) -> None:
    port = url.rsplit(":", 1)[1]
    done = subprocess.run(
        [str(BIN / "fuseline"), "serve", "--port", port], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and port in done.stderr.strip().splitlines()[-1]
