"""Bounds of requests: numbers, sizes, how many sequences in all; and the headers that every answer carries."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from api_writes_cases import open_app, until
from fastapi import APIRouter, FastAPI

from fuseline.api.config import ConfigError
from fuseline.api.config_resolve import resolve
from fuseline.api.route_table import route_table
from fuseline.api.served import generation_defaults

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]
JSON = {"content-type": "application/json"}


async def call(app: Any, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        options |= {} if body is None else {"json": body}
        return await client.request(method, path, **options)


async def refused(app: Any, path: str, raw: str | dict[str, Any]) -> tuple[str, str]:
    """The field and the message of a 400."""
    content = raw if isinstance(raw, str) else json.dumps(raw)
    response = await call(app, "POST", path, content=content.encode(), headers=JSON)
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"], response.json()["error"]["message"]


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e400", "1" + "0" * 400, str(2**64), str(-(2**63) - 1)]
NUMBERS.append("9" * 5000)
PLACES = {
    COMPLETIONS: [
        ('{"prompt": "a", "temperature": %s}', "temperature"),
        ('{"prompt": "a", "logit_bias": {"5": %s}}', "logit_bias"),
        ('{"prompt": "a", "unknown": [1, {"x": [%s]}]}', "unknown[1].x[0]"), ('{"prompt": [3, %s]}', "prompt[1]"),
        ('{"prompt": "a", "repetition_penalty": %s}', "repetition_penalty"), ('{"prompt": "a", "n": %s}', "n"),
        ('{"prompt": "a", "stop_token_ids": [1, %s]}', "stop_token_ids[1]"), ('{"prompt": "a", "top_k": %s}', "top_k"),
    ],
    CHAT: [
        ('{"messages": [{"role": "user", "content": "a", "x": %s}]}', "messages[0].x"),
        ('{"messages": [], "chat_template_kwargs": {"a": {"b": %s}}}', "chat_template_kwargs.a.b"),
    ],
    "/tokenize": [('{"prompt": "a", "x": %s}', "x")], "/detokenize": [('{"tokens": [%s]}', "tokens[0]")],
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:12])
async def test_numbers_that_are_none_name_their_field(number: str) -> None:
    app, engine = open_app()
    for path, cases in PLACES.items():
        for body, field in cases:
            assert (await refused(app, path, body % number))[0] == field
    assert not engine.requests


FLOATS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "length_penalty",
)  # fmt: skip


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-Infinity", "1e999"])
async def test_text_is_no_way_around(text: str) -> None:
    app, engine = open_app()
    for field in FLOATS:
        assert (await refused(app, COMPLETIONS, {"prompt": "a", field: text}))[0] == field
    assert (await refused(app, COMPLETIONS, {"prompt": "a", "logit_bias": {"1": text}}))[0] == "logit_bias"
    assert not engine.requests


async def test_half_a_surrogate_pair_is_named_and_whole_ones_pass() -> None:
    app, _ = open_app()
    for half in ("\\ud800", "\\udc00", "a\\ud83d", "\\ude00\\ud83d"):
        assert (await refused(app, COMPLETIONS, f'{{"prompt": ["b", "{half}"]}}'))[0] == "prompt[1]"
    for raw in ('{"prompt": "\\ud83d\\ude00"}', '\ufeff{"prompt": "a"}', '{"prompt": "a", "x": 18446744073709551615}'):
        response = await call(app, "POST", "/tokenize", content=raw.encode(), headers=JSON)
        assert response.status_code == 200, raw


@pytest.mark.parametrize("penalty", [1e-46, 1e-38, 1e-31, 1e31, 1e38])
async def test_penalties_keep_logits_finite(penalty: float) -> None:
    app, _ = open_app()
    assert (await refused(app, COMPLETIONS, {"prompt": "a", "repetition_penalty": penalty}))[0] == "repetition_penalty"
    with pytest.raises(ConfigError, match="repetition_penalty"):
        generation_defaults(resolve({"override_generation_config": {"repetition_penalty": penalty}}))


async def test_defaults_that_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="temperatur has no effect"):
        generation_defaults(resolve({"override_generation_config": {"temperatur": 0.5}}))
    assert generation_defaults(resolve({"override_generation_config": {"top_k": 5}})) == {"top_k": 5}


async def test_some_token_must_be_left() -> None:
    app, engine = open_app()
    tokenizer = app.state.served.tokenizer
    word, other = (tokenizer.token_text(token) for token in (70, 71))
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (word, other)]
    assert [len(found) for found in ids] == [1, 1]
    allowed = [found[0] for found in ids]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"allowed_token_ids": allowed, "bad_words": [word, other]}, "allowed_token_ids"),
        ({"allowed_token_ids": [0], "min_tokens": 1, "max_tokens": 2}, "allowed_token_ids"),
        ({"allowed_token_ids": [0], "min_tokens": 1, "max_tokens": 2, "ignore_eos": True}, "allowed_token_ids"),
        ({"allowed_token_ids": [9, 9], "stop_token_ids": [9], "min_tokens": 1}, "allowed_token_ids"),
    ]
    for fields, param in cases:
        assert (await refused(app, COMPLETIONS, {"prompt": "a", **fields}))[0] == param
    assert not engine.requests
    fields = {"prompt": "a", "allowed_token_ids": allowed, "bad_words": [word], "max_tokens": 1}
    task = asyncio.ensure_future(call(app, "POST", COMPLETIONS, fields))
    await until(lambda: engine.requests)
    engine.step("length")
    assert (await task).status_code == 200


SIZES = [
    ("prompt", ["a"] * 3, "max_num_prompts"), ("n", 3, "max_n"), ("stop", ["a"] * 3, "max_stop_strings"),
    ("stop", "abcd", "max_stop_length"), ("logit_bias", {"1": 1, "2": 1, "3": 1}, "max_logit_bias"),
    ("bad_words", ["a", "b", "c"], "max_bad_words"), ("stop_token_ids", [1, 2, 3], "max_stop_token_ids"),
]  # fmt: skip


@pytest.mark.parametrize("field, value, flag", SIZES)
async def test_sizes_have_flags(field: str, value: Any, flag: str) -> None:
    limit = 3 if flag == "max_stop_length" else 2
    app, engine = open_app(**{flag: limit})
    param, message = await refused(app, COMPLETIONS, {"prompt": "a", field: value})
    assert param == field and f"at most {limit} " in message and "--" + flag.replace("_", "-") in message
    app, engine = open_app(**{flag: limit + 1})
    task = asyncio.ensure_future(call(app, "POST", COMPLETIONS, {"prompt": "a", field: value, "max_tokens": 1}))
    await until(lambda: engine.requests)
    engine.step("length")
    assert (await task).status_code == 200


async def test_admission_counts_sequences() -> None:
    app, engine = open_app(max_num_seqs=2, max_num_queued_reqs=10)
    held = app.state.served.admission
    for path, fields in (
        (COMPLETIONS, {"prompt": ["a"] * 1000, "n": 4}), (COMPLETIONS, {"prompt": "a", "n": 13}),
        (COMPLETIONS, {"prompt": ["a"] * 13, "stream": True}), (CHAT, {"messages": MESSAGES, "n": 13}),
    ):  # fmt: skip
        response = await call(app, "POST", path, fields)
        assert response.status_code == 429 and "--max-num-queued-reqs" in response.json()["error"]["message"]
    full = asyncio.ensure_future(call(app, "POST", COMPLETIONS, {"prompt": ["a"] * 3, "n": 4, "max_tokens": 1}))
    await until(lambda: len(engine.requests) == 3)
    assert held.num_sequences == 12
    late = await call(app, "POST", CHAT, {"messages": MESSAGES})
    assert late.status_code == 429 and late.headers["retry-after"] == "1"
    assert late.json()["error"]["code"] == "rate_limit_exceeded"
    engine.step("length")
    assert (await full).status_code == 200 and held.num_sequences == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_places_are_given_back_whatever_happens(stream: bool) -> None:
    app, engine = open_app(max_num_seqs=2, max_num_queued_reqs=10)
    held = app.state.served.admission
    await refused(app, COMPLETIONS, {"prompt": [[1], [99999]], "stream": stream})
    assert held.num_sequences == 0
    leaving = asyncio.ensure_future(call(app, "POST", COMPLETIONS, {"prompt": ["a", "b"], "stream": stream}))
    await until(lambda: len(engine.requests) == 2)
    assert held.num_sequences == 2
    leaving.cancel()
    await until(lambda: held.num_sequences == 0)
    failing = asyncio.ensure_future(call(app, "POST", COMPLETIONS, {"prompt": ["a", "b"], "stream": stream}))
    await until(lambda: len(engine.requests) == 4)
    engine.step("error", "no")
    assert (await failing).status_code == 500 and held.num_sequences == 0
    await until(lambda: engine.num_in_flight == 0)


async def test_every_answer_carries_its_id_and_its_origin() -> None:
    app, _ = open_app(enable_request_id_headers=True, api_key=["k"], allowed_origins=["http://here"], max_num_seqs=1)
    served = app.state.served

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a secret")

    sent = {"x-request-id": "mine", "origin": "http://here", "authorization": "Bearer k"}
    body = {"prompt": "a"}
    cases = [
        ("GET", "/broken", None, {}, 500), ("GET", "/nothing", None, {}, 404), ("GET", COMPLETIONS, None, {}, 405),
        ("POST", COMPLETIONS, body, {"authorization": "Bearer no"}, 401), ("POST", COMPLETIONS, {}, {}, 400),
        ("POST", COMPLETIONS, body, {"content-type": "text/plain"}, 415), ("GET", "/health", None, {}, 200),
        ("POST", COMPLETIONS, {**body, "n": 100}, {}, 429),
    ]  # fmt: skip
    for method, path, content, more, status in cases:
        response = await call(app, method, path, content, headers=sent | more)
        assert response.status_code == status, response.text
        assert response.headers["x-request-id"] == "mine"
        assert response.headers["access-control-allow-origin"] == "http://here"
        assert "secret" not in response.text
        if status >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert (await call(app, "GET", COMPLETIONS, headers=sent)).headers["allow"] == "POST"
    served.is_draining = True
    response = await call(app, "POST", COMPLETIONS, body, headers=sent)
    assert response.status_code == 503 and response.headers["x-request-id"] == "mine"
    assert response.headers["access-control-allow-origin"] == "http://here"


def test_the_route_list_names_every_path() -> None:
    app, _ = open_app()
    table = dict(route_table(app))
    assert all(isinstance(path, str) and path.startswith("/") for path in table)
    assert table[COMPLETIONS] == ["POST"] and table["/ping"] == ["GET", "HEAD", "POST"]
    assert {CHAT, "/", "/health", "/v1/models", "/metrics", "/docs", "/web/app.js"} <= set(table)
    outer, inner = APIRouter(prefix="/in"), APIRouter(prefix="/deep")
    inner.add_api_route("/x", lambda: None, methods=["PUT"])
    outer.include_router(inner, prefix="/between")
    nested, mounted = FastAPI(), FastAPI()
    nested.include_router(outer, prefix="/out")
    mounted.mount("/m", nested)
    assert dict(route_table(mounted))["/m/out/in/between/deep/x"] == ["PUT"]


async def test_what_would_have_no_effect_is_refused() -> None:
    app, _ = open_app()
    assert (await refused(app, COMPLETIONS, {"prompt": "a", "length_penalty": 0.5}))[0] == "length_penalty"
    with pytest.raises(ConfigError, match="compile_sizes"):
        resolve({"compilation_config": {"compile_sizes": [1]}})


async def test_a_salt_and_an_effort_go_on() -> None:
    app, engine = open_app(chat_template="{{ reasoning_effort }} {{ messages[0].content }}")
    fields = {"messages": MESSAGES, "max_tokens": 1, "cache_salt": "s", "reasoning_effort": "high"}
    task = asyncio.ensure_future(call(app, "POST", CHAT, fields))
    await until(lambda: engine.requests)
    engine.step("length")
    assert (await task).status_code == 200
    expected = app.state.served.tokenizer.encode("high a", add_special_tokens=False)
    assert engine.requests[0].cache_salt == "s" and engine.requests[0].prompt_token_ids == tuple(expected)


async def test_the_prompts_of_a_body_take_turns_with_other_requests() -> None:
    """Each tells the engine how many of its body come before it."""
    app, engine = open_app()
    task = asyncio.ensure_future(call(app, "POST", COMPLETIONS, {"prompt": ["a", "b", "c"], "max_tokens": 1}))
    await until(lambda: len(engine.requests) == 3)
    engine.step("length")
    assert (await task).status_code == 200
    assert [request.turn for request in engine.requests] == [0, 1, 2]
