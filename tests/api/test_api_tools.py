"""Tools and reasoning on the wire, by the bundled model: it writes Hermes calls and Qwen3 thoughts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_client import MESSAGES, Api
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fuseline.api.config import ConfigError
from fuseline.api.config_resolve import resolve

CHAT = "/v1/chat/completions"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": CITY}}
ASKS = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "tools": [WEATHER]}
THINKS = {
    "messages": [{"role": "user", "content": "What is 12 plus 7?"}],
    "chat_template_kwargs": {"enable_thinking": True},
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
GREEDY = {"temperature": 0, "max_tokens": 80}


@pytest.fixture(scope="module")
def tooled() -> Iterator[Api]:
    opened = Api(enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[Api]:
    opened = Api()
    yield opened
    opened.close()


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's deltas make, as clients join them; each field only where a delta had it."""
    message: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in ChatCompletionChunk.model_validate(event).model_dump(exclude_unset=True)["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content", "reasoning"):
                if name in delta:
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                known = calls.setdefault(call["index"], {"id": call.get("id"), "type": "function", "function": {}})
                for name, text in call["function"].items():
                    known["function"][name] = known["function"].get(name, "") + text
            message["finish_reason"] = choice["finish_reason"]
    return {**message, "tool_calls": list(calls.values())}


def test_a_call(tooled: Api) -> None:
    body = tooled.answer(CHAT, **ASKS, **GREEDY)
    ChatCompletion.model_validate(body)
    (choice,) = body["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("chatcmpl-tool-") and call["type"] == "function"
    assert call["function"]["name"] == "get_weather" and json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None


def test_a_streamed_call(tooled: Api) -> None:
    whole = tooled.answer(CHAT, **ASKS, **GREEDY)
    events = tooled.stream(CHAT, **ASKS, **GREEDY, stream_options={"include_usage": True})
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert len(calls) > 2 and {call["index"] for call in calls} == {0}
    assert calls[0]["id"] and calls[0]["function"]["name"] == "get_weather"
    assert all("id" not in call and set(call["function"]) == {"arguments"} for call in calls[1:])
    message = joined(events)
    assert message["tool_calls"][0]["function"] == whole["choices"][0]["message"]["tool_calls"][0]["function"]
    assert message["finish_reason"] == "tool_calls" and not message["content"]
    assert events[-1]["usage"] == whole["usage"]


def test_log_probabilities_of_a_streamed_call_are_complete(tooled: Api) -> None:
    fields = {**ASKS, **GREEDY, "logprobs": True, "return_token_ids": True}
    whole = tooled.answer(CHAT, **fields)["choices"][0]
    choices = [choice for event in tooled.stream(CHAT, **fields) for choice in event["choices"]]
    assert [token for c in choices for token in c.get("token_ids") or ()] == whole["token_ids"]
    shown = [entry for choice in choices for entry in (choice.get("logprobs") or {}).get("content") or ()]
    assert shown == whole["logprobs"]["content"]


def test_a_call_and_its_answer_go_back_to_the_model(tooled: Api) -> None:
    call = tooled.answer(CHAT, **ASKS, **GREEDY)["choices"][0]["message"]["tool_calls"][0]
    history = [
        *ASKS["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny, 20 degrees"},
    ]
    message = tooled.answer(CHAT, **{**ASKS, "messages": history}, **GREEDY)["choices"][0]["message"]
    assert "sunny" in message["content"] and "tool_calls" not in message


def test_cut_by_length_and_one_of_several_choices(tooled: Api) -> None:
    fields = {**ASKS, "temperature": 0, "max_tokens": 15}
    (choice,) = tooled.answer(CHAT, **fields)["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"]
    assert joined(tooled.stream(CHAT, **fields))["finish_reason"] == "length"
    for choice in tooled.answer(CHAT, **{**fields, "temperature": 1, "n": 3, "max_tokens": 60})["choices"]:
        assert choice["finish_reason"] == ("tool_calls" if choice["message"].get("tool_calls") else "stop")


def test_no_tools_without_choice(tooled: Api) -> None:
    """Neither the template nor the parser knows of them."""
    without = tooled.answer(CHAT, messages=ASKS["messages"], **GREEDY)
    hidden = tooled.answer(CHAT, **ASKS, tool_choice="none", **GREEDY)
    assert hidden["choices"] == without["choices"] and hidden["usage"] == without["usage"]


def test_reasoning(tooled: Api) -> None:
    body = tooled.answer(CHAT, **THINKS, **GREEDY)
    message = body["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] and "12" in message["reasoning"]
    assert "19" in message["content"] and "think>" not in message["content"] + message["reasoning"]
    counted = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < counted < body["usage"]["completion_tokens"]
    streamed = joined(tooled.stream(CHAT, **THINKS, **GREEDY))
    assert {name: streamed[name] for name in ("content", "reasoning", "reasoning_content")} == {
        name: message[name] for name in ("content", "reasoning", "reasoning_content")
    }
    dropped = tooled.answer(CHAT, **THINKS, **GREEDY, include_reasoning=False)["choices"][0]["message"]
    assert dropped["content"] == message["content"] and not dropped["reasoning_content"]


def test_an_answer_without_thoughts_has_none(tooled: Api) -> None:
    fields = {**THINKS, "chat_template_kwargs": {"enable_thinking": False}}
    message = tooled.answer(CHAT, **fields, **GREEDY)["choices"][0]["message"]
    assert message["reasoning_content"] is None and "19" in message["content"]


SHORT = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}, "now": {"type": "boolean"}},
    "required": ["city", "now"], "additionalProperties": False,
}  # fmt: skip
CHOSEN = {
    "messages": ASKS["messages"], "max_tokens": 200,
    "tools": [{"type": "function", "function": {"name": name, "parameters": SHORT}} for name in ("get_weather", "f")],
}  # fmt: skip


def test_structured_output_begins_behind_the_reasoning(tooled: Api) -> None:
    fields = {**THINKS, "guided_json": SHORT, "temperature": 0, "max_tokens": 200}
    (choice,) = tooled.answer(CHAT, **fields)["choices"]
    assert choice["finish_reason"] == "stop" and "12" in choice["message"]["reasoning_content"]
    assert set(json.loads(choice["message"]["content"])) == {"city", "now"}


def test_a_named_function_is_called(tooled: Api) -> None:
    fields = {**CHOSEN, "tool_choice": NAMED, "temperature": 0}
    (choice,) = tooled.answer(CHAT, **fields)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == ""
    assert call["function"]["name"] == "get_weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city", "now"}
    streamed = joined(tooled.stream(CHAT, **fields))
    assert streamed["tool_calls"][0]["function"] == call["function"] and streamed["finish_reason"] == "stop"


def test_required_calls_are_made(tooled: Api, plain: Api) -> None:
    """Whatever the temperature, and also where no parser is set."""
    fields = {**CHOSEN, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1}
    for api in (tooled, plain):
        for choice in api.answer(CHAT, **fields, n=4, seed=1)["choices"]:
            (call,) = choice["message"]["tool_calls"]
            assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
            assert call["function"]["name"] in ("get_weather", "f")
            assert set(json.loads(call["function"]["arguments"])) == {"city", "now"}
    message = joined(tooled.stream(CHAT, **fields, seed=1))
    assert message["finish_reason"] == "tool_calls" and len(message["tool_calls"]) == 1 and not message["content"]


REFUSED = {
    "no tools": ({"tools": []}, "tools", "empty"),
    "choice alone": ({"tools": None, "tool_choice": "auto"}, "tool_choice", "`tools` must be set"),
    "named alone": ({"tools": None, "tool_choice": NAMED}, "tool_choice", "`tools` must be set"),
    "unknown choice": ({"tool_choice": "always"}, "tool_choice", "always"),
    "no function": ({"tool_choice": {"type": "function"}}, "tool_choice.function", "`function`"),
    "no name": ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", "`name`"),
    "other name": (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name", "does not match",
    ),
    "other type": ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0].type", "function"),
    "tool without function": ({"tools": [WEATHER, {"type": "function"}]}, "tools[1].function", "object"),
    "tool without name": ({"tools": [{"function": {}}]}, "tools[0].function.name", "text"),
    "odd parameters": (
        {"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters", "schema",
    ),
    "odd strict": ({"tools": [{"function": {"name": "f", "strict": "x"}}]}, "tools[0].function.strict", "true"),
    "guided and required": ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex", "not both"),
    "guided and named": ({"tool_choice": NAMED, "guided_choice": ["a"]}, "guided_choice", "not both"),
    "budget": ({"thinking_token_budget": 5}, "thinking_token_budget", "not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_field(tooled: Api, name: str) -> None:
    fields, param, words = REFUSED[name]
    response = tooled.post(CHAT, {"model": "demo", **ASKS, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and words in error["message"]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
def test_a_forced_call_goes_before_the_format_of_text(tooled: Api, choice: Any) -> None:
    shape = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": shape}}
    fields = {**ASKS, **GREEDY, "tool_choice": choice, "parallel_tool_calls": False}
    called = tooled.answer(CHAT, **fields, response_format=form)["choices"][0]["message"]["tool_calls"][0]["function"]
    plainly = tooled.answer(CHAT, **fields)["choices"][0]["message"]["tool_calls"][0]["function"]
    assert called == plainly and called["name"] == "get_weather"


def test_the_model_decides_only_where_the_flags_allow_it(plain: Api) -> None:
    for choice in ({}, {"tool_choice": "auto"}):
        response = plain.post(CHAT, {"model": "demo", **ASKS, **choice})
        message = response.json()["error"]["message"]
        assert response.status_code == 400
        assert "--enable-auto-tool-choice" in message and "--tool-call-parser" in message
    message = plain.answer(CHAT, messages=MESSAGES, **GREEDY)["choices"][0]["message"]
    assert "reasoning" not in message and "tool_calls" not in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"enable_auto_tool_choice": True}, "needs --tool-call-parser, one of .*hermes"),
        ({"tool_call_parser": "nope"}, "choose from .*granite-20b-fc.*pythonic"),
        ({"enable_reasoning": True}, "needs --reasoning-parser, one of .*deepseek_r1"),
        ({"reasoning_parser": "nope"}, "choose from .*deepseek_r1"),
        ({"tool_parser_plugin": "/absent.py", "tool_call_parser": "x"}, "no such file"),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve({"model": "demo", **flags})


def test_both_switches_go_together() -> None:
    config = resolve({
        "model": "demo", "enable_auto_tool_choice": True, "tool_call_parser": "hermes", "enable_reasoning": True,
        "reasoning_parser": "deepseek_r1",
    })  # fmt: skip
    assert config.enable_auto_tool_choice and config.enable_reasoning
