"""Flags of the API, each observed in an answer: one engine, and an application for each configuration around it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fuseline.api.app import build_app
from fuseline.api.config import ConfigError, Environment
from fuseline.api.config_resolve import config_dict, resolve
from fuseline.api.llm import LLM

HELLO = [{"role": "user", "content": "Hello!"}]
IDS = {"prompt": [3, 4, 5], "max_tokens": 3, "temperature": 0, "ignore_eos": True}


class Door:
    """The application of one configuration."""

    def __init__(self, llm: LLM, **flags: Any) -> None:
        defaults = {"model": "demo", "prompt_workers": 0, "disable_log_requests": True}
        self.config = resolve({**defaults, **flags}, Environment(server_dev_mode="1"))
        served = llm._app.state.served
        tokenizer = None if self.config.skip_tokenizer_init else served.tokenizer
        self.app = build_app(self.config, served.client, llm.ready, tokenizer)
        self._llm = llm

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, headers=headers, **({} if body is None else {"json": body}))

        return self._llm._call(send())

    def complete(self, **fields: Any) -> dict[str, Any]:
        response = self.call("POST", "/v1/completions", {**IDS, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, **fields: Any) -> dict[str, Any]:
        response = self.call("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 2, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def prompt(self, messages: list | None = None, **fields: Any) -> str:
        """The rendered chat, by way of /tokenize."""
        found = self.call("POST", "/tokenize", {"messages": messages or HELLO, **fields}).json()["tokens"]
        return self.call("POST", "/detokenize", {"tokens": found}).json()["prompt"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", show_progress=False, max_num_seqs=8) as opened:
        yield opened


@pytest.fixture(scope="module")
def door(llm: LLM) -> Callable[..., Door]:
    return lambda **flags: Door(llm, **flags)


def test_cross_origin_flags(door) -> None:
    def preflight(opened: Door) -> httpx.Headers:
        asked = {"access-control-request-method": "PUT", "access-control-request-headers": "x-mine"}
        return opened.call("OPTIONS", "/v1/models", origin="http://a", **asked).headers

    limited = door(allowed_methods=["GET"], allowed_headers=["x-mine"], allow_credentials=True)
    assert preflight(limited)["access-control-allow-methods"] == "GET"
    assert "x-mine" in preflight(limited)["access-control-allow-headers"]
    answer = limited.call("GET", "/v1/models", origin="http://a")
    assert answer.headers["access-control-allow-credentials"] == "true"
    open_to_all = door()
    assert "PUT" in preflight(open_to_all)["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in open_to_all.call("GET", "/v1/models", origin="http://a").headers


def test_pages_of_documentation(door) -> None:
    for is_disabled, status in ((False, 200), (True, 404)):
        opened = door(disable_fastapi_docs=is_disabled)
        assert {opened.call("GET", path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {status}


def test_root_path_is_in_the_description(door) -> None:
    assert door(root_path="/api").call("GET", "/openapi.json").json()["servers"] == [{"url": "/api"}]
    assert "servers" not in door().call("GET", "/openapi.json").json()


def test_statistics_can_be_turned_off(door) -> None:
    assert "fuseline:" not in door(disable_log_stats=True).call("GET", "/metrics").text
    assert "fuseline:" in door().call("GET", "/metrics").text
    assert "vllm:" in door(metrics_prefix="vllm:").call("GET", "/metrics").text


MIDDLEWARE = """
async def stamp(request, call_next):
    response = await call_next(request)
    response.headers["x-stamp"] = "1"
    return response


class Wall:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope.get("path") != "/walled":
            return await self.app(scope, receive, send)
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b""})


number = 3
"""


def test_middleware_functions_and_classes(door, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "flag_middleware.py").write_text(MIDDLEWARE)
    monkeypatch.syspath_prepend(tmp_path)
    opened = door(middleware=["flag_middleware.stamp", "flag_middleware.Wall"])
    assert opened.call("GET", "/version").headers["x-stamp"] == "1"
    assert opened.call("GET", "/walled").status_code == 418
    for bad in ("flag_middleware.number", "flag_middleware.none", "no_such.module", "x"):
        with pytest.raises(ConfigError, match=f"--middleware {bad}"):
            door(middleware=[bad])


def test_bound_of_log_probabilities(door) -> None:
    def status(opened: Door, wanted: int) -> int:
        return opened.call("POST", "/v1/completions", {**IDS, "logprobs": wanted}).status_code

    assert (status(door(), 20), status(door(), 21)) == (200, 400)
    assert (status(door(max_logprobs=3), 3), status(door(max_logprobs=3), 4)) == (200, 400)
    assert (status(door(max_logprobs=0), 0), status(door(max_logprobs=0), 1)) == (200, 400)
    assert status(door(max_logprobs=-1), 50) == 200


def test_tokens_as_ids(door) -> None:
    shown = door(return_tokens_as_token_ids=True).complete(logprobs=1)["choices"][0]["logprobs"]["tokens"]
    assert all(token.startswith("token_id:") for token in shown)
    plain = door().complete(logprobs=1)["choices"][0]["logprobs"]["tokens"]
    assert not any(token.startswith("token_id:") for token in plain)


def test_role_of_answers(door) -> None:
    assert door(response_role="bot").chat()["choices"][0]["message"]["role"] == "bot"
    assert door().chat()["choices"][0]["message"]["role"] == "assistant"


def test_details_of_prompt_tokens(door) -> None:
    details = door(enable_prompt_tokens_details=True)
    for _ in range(2):
        usage = details.complete(prompt=list(range(3, 60)))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 16
    assert not door().complete(prompt=list(range(3, 60)))["usage"].get("prompt_tokens_details")


def test_usage_can_be_forced_into_streams(door) -> None:
    def last(opened: Door) -> dict[str, Any]:
        text = opened.call("POST", "/v1/completions", {**IDS, "stream": True}).text
        return json.loads([line for line in text.splitlines() if line.startswith("data: {")][-1][6:])

    assert last(door(enable_force_include_usage=True))["usage"]["completion_tokens"] == 3
    assert not last(door()).get("usage")


def test_without_a_tokenizer_only_ids(door) -> None:
    opened = door(skip_tokenizer_init=True)
    choice = opened.complete(return_token_ids=True)["choices"][0]
    assert choice["text"] == "" and len(choice["token_ids"]) == 3
    for path, body in (("/v1/completions", {"prompt": "text"}), ("/v1/chat/completions", {"messages": HELLO}),
                       ("/tokenize", {"prompt": "text"}), ("/v1/completions", {**IDS, "stop": "x"})):  # fmt: skip
        assert opened.call("POST", path, body).status_code == 400


def test_template_and_its_content_format(door, tmp_path: Path) -> None:
    template = "{% if messages[0].content is string %}text{% else %}parts{% endif %}: {{ tone }}"
    (tmp_path / "t.jinja").write_text(template)
    assert door(chat_template=str(tmp_path / "t.jinja")).prompt() == "text: "
    defaults = {"chat_template": template, "default_chat_template_kwargs": {"tone": "kind"}}
    assert door(**defaults).prompt() == "text: kind"
    assert door(**defaults).prompt(chat_template_kwargs={"tone": "dry"}) == "text: dry"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
    for content_format, shown in (("auto", "text: "), ("string", "text: "), ("openai", "parts: ")):
        opened = door(chat_template=template, chat_template_content_format=content_format)
        assert opened.prompt() == opened.prompt(parts) == shown


def test_sampling_defaults(door, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 2, "top_k": 1}))

    def length(**flags: Any) -> int:
        return door(**flags).complete(max_tokens=5)["usage"]["completion_tokens"]

    assert [length(generation_config=kind) for kind in ("none", "vllm", "", "auto")] == [5] * 4
    assert length(generation_config=str(tmp_path)) == 2
    assert length(generation_config=str(tmp_path), override_generation_config={"max_new_tokens": 4}) == 4
    assert length(override_generation_config={"max_new_tokens": 3}) == 3
    greedy = {door(generation_config=str(tmp_path)).complete(temperature=1.0, seed=seed)["choices"][0]["text"]
              for seed in range(4)}  # fmt: skip
    assert len(greedy) == 1, "top_k 1 is the default"
    with pytest.raises(ConfigError, match="--override-generation-config: colour has no effect"):
        door(override_generation_config={"colour": 1})


def test_unknown_fields_are_refused_where_strictness_is_wanted(door) -> None:
    body = {**IDS, "colour": "red"}
    assert door().call("POST", "/v1/completions", body).status_code == 200
    refused = door(strict_requests=True).call("POST", "/v1/completions", body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "colour"
    assert door(strict_requests=True).complete()["usage"]["completion_tokens"] == 3


def test_the_tokenizer_is_shown_on_request(door) -> None:
    shown = door(enable_tokenizer_info_endpoint=True).call("GET", "/tokenizer_info").json()
    assert shown["chat_template"] and "eos_token" in shown
    assert door().call("GET", "/tokenizer_info").status_code == 404


def test_the_request_log(door, caplog) -> None:
    caplog.set_level(logging.INFO, "fuseline.requests")

    def lines(**flags: Any) -> list[str]:
        caplog.clear()
        door(**flags).chat(max_tokens=1)
        return [record.getMessage() for record in caplog.records if "prompt" in record.getMessage()]

    assert lines() == lines(disable_log_requests=None, enable_log_requests=False) == []
    assert "Hello!" in lines(disable_log_requests=False)[0]
    assert "Hello!" in lines(disable_log_requests=None, enable_log_requests=True)[0]
    assert "Hello!" not in lines(disable_log_requests=False, max_log_len=3)[0]


def test_what_clients_write_is_in_no_log_unless_a_flag_asks_for_it(door, caplog) -> None:
    caplog.set_level(logging.DEBUG, "fuseline")
    opened = door(disable_log_requests=None)
    words = {"guided_choice": ["secret one", "secret two"], "stop": "secret", "user": "secret", "min_tokens": 1}
    opened.chat(messages=[{"role": "user", "content": "secret"}], **words)
    opened.complete(prompt="secret", bad_words=["secret"])
    opened.call("POST", "/v1/completions", {"prompt": "secret", "n": "secret", "secret": 1})
    told = [record.getMessage() for record in caplog.records if record.name == "fuseline.requests"]
    assert any("prompt of" in line and "min_tokens=1" in line for line in told)
    assert not any("secret" in line for line in told)


def test_stacks_of_refused_requests(door, caplog) -> None:
    for wants, count in ((False, 0), (True, 1)):
        caplog.clear()
        door(log_error_stack=wants).call("POST", "/v1/completions", {"prompt": []})
        assert sum(record.exc_info is not None for record in caplog.records) == count


def test_an_offline_engine_that_generates_gives_no_vectors(llm: LLM) -> None:
    with pytest.raises(ValueError, match="does not support Pooling"):
        llm.encode("Hello!")


def test_load_is_counted_on_request(door) -> None:
    assert door(enable_server_load_tracking=True).call("GET", "/load").json() == {"server_load": 0}


def test_the_configuration_of_a_running_server(door) -> None:
    opened = door(max_log_len=7, api_key=["k"])
    shown = opened.call("GET", "/server_info", authorization="Bearer k").json()
    assert shown == json.loads(json.dumps(config_dict(opened.config)))
    assert shown["max_log_len"] == 7 and shown["api_key"] == "***"
