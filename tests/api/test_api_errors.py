"""Every request field: values out of its range or of another type are refused with 400, and the field is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
from api_client import MESSAGES, Api, api

__all__ = ["api"]
ROUTES = {"/v1/completions": {"prompt": "Hi"}, "/v1/chat/completions": {"messages": MESSAGES}}
COMMON: list[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "warm"), ("top_p", 0), ("top_p", 1.01), ("top_k", -2),
    ("min_p", -0.1), ("min_p", 1.1), ("frequency_penalty", 2.5), ("presence_penalty", -2.5),
    ("repetition_penalty", 0), ("n", 0), ("n", 129), ("n", "two"), ("max_tokens", 0), ("max_tokens", -1),
    ("min_tokens", -1), ("seed", 2**63), ("seed", 1.5), ("stop", [""] * 1), ("stop", ["x"] * 17), ("stop", 5),
    ("stop_token_ids", ["a"]), ("logit_bias", {"a": 1}), ("logit_bias", {"99999": 1}),
    ("stream", "maybe"), ("stream_options", {"include_usage": True}), ("allowed_token_ids", []),
    ("allowed_token_ids", [99999]), ("prompt_logprobs", -2), ("truncate_prompt_tokens", 0), ("best_of", 0),
]  # fmt: skip
LATER: list[tuple[str, Any]] = [
    ("guided_json", 5), ("guided_regex", "("), ("guided_choice", []),
    ("logits_processors", ["x"]), ("response_format", {"type": "json_schema"}),
]  # fmt: skip
OWN = {
    "/v1/completions": [("logprobs", -2), ("logprobs", 21), ("prompt", []), ("prompt", [99999]), ("prompt", 5)],
    "/v1/chat/completions": [
        ("messages", []), ("messages", "hi"), ("messages", [{"content": "x"}]), ("messages", [{"role": "user"}, 3]),
        ("top_logprobs", 3), ("top_logprobs", -1),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ],
}  # fmt: skip
CASES = [
    (path, field, value) for path in ROUTES for field, value in COMMON + LATER + OWN[path]
]  # fmt: skip


@pytest.mark.parametrize("path, field, value", CASES, ids=lambda part: str(part)[:28])
def test_bad_values_name_the_field(api: Api, path: str, field: str, value: Any) -> None:
    response = api.post(path, {"model": "demo", "max_tokens": 2, **ROUTES[path], field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"] and re.split(r"[.\[]", error["param"] or "")[0] == field


@pytest.mark.parametrize("path", ROUTES)
def test_null_is_the_default_and_unknown_fields_are_ignored(api: Api, path: str) -> None:
    fields = {field: None for field, _ in COMMON if field != "max_tokens"}
    answer = api.answer(path, **{**ROUTES[path], **fields, "max_tokens": 2, "no_such_field": 1, "user": "u"})
    assert answer["usage"]["completion_tokens"] <= 2


@pytest.mark.parametrize("path", ROUTES)
def test_unknown_models_and_bodies_that_are_no_json(api: Api, path: str) -> None:
    error = api.post(path, {"model": "nobody", **ROUTES[path]})
    assert error.status_code == 404 and error.json()["error"]["code"] == "model_not_found"
    assert "nobody" in error.json()["error"]["message"]
    for content in (b"{", b"[1]", b"", b'{"a": NaN'):
        response = api.call("POST", path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_prompts_longer_than_the_context_are_refused(api: Api) -> None:
    response = api.post("/v1/completions", {"model": "demo", "prompt": [5] * 100_000, "max_tokens": 1})
    assert response.status_code == 400 and "context length" in response.json()["error"]["message"]


def test_routes_that_are_not_there(api: Api) -> None:
    missing = api.call("GET", "/v1/nothing")
    assert missing.status_code == 404 and set(missing.json()["error"]) == {"message", "type", "param", "code"}
    wrong = api.call("GET", "/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"


EXTREMES: list[dict[str, Any]] = [
    {"top_k": 2**63}, {"top_k": 2**31}, {"seed": 2**63 - 1, "n": 3}, {"seed": -(2**63), "n": 2}, {"seed": -1},
    {"min_p": 1, "top_p": 1e-9}, {"temperature": 1e-30}, {"repetition_penalty": 1e30}, {"logit_bias": {"1": 1e9}},
]  # fmt: skip


@pytest.mark.parametrize("fields", EXTREMES, ids=str)
def test_extreme_values_are_served(api: Api, fields: dict[str, Any]) -> None:
    fields = {"temperature": 1.0, "ignore_eos": True, **fields}
    assert api.answer("/v1/completions", prompt="Hi", max_tokens=3, **fields)["usage"]["completion_tokens"] >= 3
    assert api.call("GET", "/health").status_code == 200


@pytest.mark.parametrize("field, value", [("priority", 2**63), ("stop_token_ids", [2**70]), ("max_tokens", 2**70)])
def test_numbers_beyond_all_bounds_are_refused_or_bounded(api: Api, field: str, value: Any) -> None:
    response = api.post("/v1/completions", {"model": "demo", "prompt": "Hi", "max_tokens": 2, field: value})
    assert response.status_code == 400 and response.json()["error"]["param"].split("[")[0] == field


@pytest.mark.parametrize("variables", [{"messages": "x"}, {"self": 1}, {"bos_token": None}, {"a b": 2}], ids=str)
def test_template_variables_may_have_any_name(api: Api, variables: dict[str, Any]) -> None:
    answer = api.answer(
        "/v1/chat/completions", messages=MESSAGES, max_tokens=12, temperature=0, chat_template_kwargs=variables
    )
    assert "Paris" in answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("calls", [[{"function": "f"}], ["f"], [{"function": {"arguments": "{"}}]], ids=str)
def test_malformed_tool_calls_are_refused(api: Api, calls: list) -> None:
    messages = [*MESSAGES, {"role": "assistant", "tool_calls": calls}]
    response = api.post("/v1/chat/completions", {"model": "demo", "messages": messages, "max_tokens": 2})
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("messages")


def test_text_that_is_none_and_nesting_without_end(api: Api) -> None:
    deep = b'{"model": "demo", "prompt": "x", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    half = b'{"model": "demo", "prompt": "\\ud800"}'
    whole = b'{"model": "demo", "prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    for content, status in ((deep, 400), (half, 400), (whole, 200)):
        headers = {"content-type": "application/json"}
        assert api.call("POST", "/v1/completions", content=content, headers=headers).status_code == status
