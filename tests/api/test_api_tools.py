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
    "budget": ({"thinking_token_budget": -2}, "thinking_token_budget", "-1"),
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


NIGHTS = {
    "type": "object", "properties": {"nights": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["nights"],
    "additionalProperties": False,
}  # fmt: skip
STRICT = {"type": "function", "function": {**WEATHER["function"], "parameters": NIGHTS, "strict": True}}


def test_strict_arguments_are_valid_and_text_is_free(tooled: Api) -> None:
    """The bundled model would write a city there: its own choice to call stays, its arguments follow the schema."""
    asks = {**ASKS, "tools": [STRICT], "max_tokens": 120}
    for fields in ({"temperature": 0}, {"temperature": 1, "seed": 1, "n": 4}, {"temperature": 0, "min_tokens": 20}):
        for choice in tooled.answer(CHAT, **asks, **fields)["choices"]:
            for call in choice["message"].get("tool_calls") or ():
                assert 1 <= json.loads(call["function"]["arguments"])["nights"] <= 9
    (choice,) = tooled.answer(CHAT, **asks, temperature=0)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert (
        joined(tooled.stream(CHAT, **asks, temperature=0))["tool_calls"][0]["function"]["arguments"]
        == (choice["message"]["tool_calls"][0]["function"]["arguments"])
    )
    plain = {"messages": MESSAGES, "temperature": 0, "max_tokens": 30}
    free, held = (
        tooled.answer(CHAT, **plain, tools=[{**STRICT, "function": {**STRICT["function"], "strict": strict}}])[
            "choices"
        ]
        for strict in (False, True)
    )
    assert free == held and held[0]["message"]["content"]
    stopped = tooled.answer(CHAT, **plain, tools=[STRICT], stop=[held[0]["message"]["content"][1:3]])["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["message"]["content"] == held[0]["message"]["content"][:1]


def test_a_response_format_leaves_the_choice_of_a_call(tooled: Api) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    called = tooled.answer(CHAT, **ASKS, **GREEDY, response_format=form)["choices"][0]
    assert called["finish_reason"] == "tool_calls" and called["message"]["tool_calls"]
    for seed in range(4):
        asks = {**ASKS, "messages": THINKS["messages"], "max_tokens": 120, "seed": seed}
        (choice,) = tooled.answer(CHAT, **asks, response_format=form)["choices"]
        if not choice["message"].get("tool_calls"):
            assert isinstance(json.loads(choice["message"]["content"])["sum"], int)


def test_a_strict_schema_that_no_grammar_holds_is_refused(tooled: Api) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}, "strict": True}}
    response = tooled.post(CHAT, {"model": "demo", **ASKS, "tools": [tool]})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tools"
    del tool["function"]["strict"]
    assert tooled.post(CHAT, {"model": "demo", **ASKS, **GREEDY, "tools": [tool]}).status_code == 200


NIGHT = {"type": "function", "function": {"name": "book_night", "description": "Book", "parameters": NIGHTS}}
FUNCTION = {"type": "function", "function": {"name": "book_night"}}


def allowed(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def test_allowed_tools(tooled: Api) -> None:
    """All are shown, some may be called."""
    asks = {**ASKS, "tools": [WEATHER, NIGHT], "temperature": 1, "max_tokens": 150}
    for choice in (allowed("required", FUNCTION), {"type": "allowed_tools", "mode": "required", "tools": [FUNCTION]}):
        calls = tooled.answer(CHAT, **asks, tool_choice=choice, seed=1)["choices"][0]["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} == {"book_night"}
    free = tooled.answer(CHAT, **asks, tool_choice=allowed("auto", FUNCTION), n=6, seed=1)
    names = [call["function"]["name"] for c in free["choices"] for call in c["message"].get("tool_calls") or ()]
    assert set(names) <= {"book_night"}
    both = {**asks, "temperature": 0, "max_tokens": 80}
    every = [WEATHER, FUNCTION]
    assert (
        tooled.answer(CHAT, **both, tool_choice=allowed("auto", *every))["usage"]
        == tooled.answer(CHAT, **both)["usage"]
    )
    flat = [{"type": "function", **tool["function"]} for tool in (NIGHT, WEATHER)]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "book_night"}]}
    answer = tooled.answer("/v1/responses", input="Hi", tools=flat, tool_choice=choice, max_output_tokens=200)
    assert {item["name"] for item in answer["output"] if item["type"] == "function_call"} <= {"book_night"}


@pytest.mark.parametrize(
    ("choice", "param", "word"),
    [
        (allowed("always", FUNCTION), "tool_choice.allowed_tools.mode", "auto"),
        (allowed("auto"), "tool_choice.allowed_tools.tools", "empty"),
        (allowed("auto", NAMED), "tool_choice.allowed_tools.tools[0]", "get_weather"),
        (allowed("auto", {"type": "mcp"}), "tool_choice.allowed_tools.tools[0]", "function"),
        ({"type": "allowed_tools", "allowed_tools": 3}, "tool_choice.allowed_tools", "object"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"name": 3}]}, "tool_choice.tools[0]", "match"),
    ],
    ids=str,
)
def test_allowed_tools_that_are_wrong(tooled: Api, choice: dict[str, Any], param: str, word: str) -> None:
    body = {"model": "demo", "messages": ASKS["messages"], "tools": [NIGHT], "tool_choice": choice}
    error = tooled.post(CHAT, body).json()["error"]
    assert error["param"] == param and word in error["message"]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
def test_a_forced_call_cut_by_length_is_no_text(tooled: Api, choice: Any) -> None:
    for limit in (1, 3, 6, 9, 14):
        fields = {**ASKS, "tool_choice": choice, "temperature": 0, "max_tokens": limit}
        (whole,) = tooled.answer(CHAT, **fields)["choices"]
        assert whole["finish_reason"] == "length" and not whole["message"]["content"]
        streamed = joined(tooled.stream(CHAT, **fields))
        assert streamed["finish_reason"] == "length" and not streamed.get("content")
        assert len(streamed["tool_calls"]) == len(whole["message"].get("tool_calls") or ())


@pytest.mark.parametrize(
    "more", [{}, {"tools": [WEATHER], "tool_choice": NAMED}, {"guided_regex": "[0-9]{1,3}"}], ids=str
)
def test_reasoning_ends_when_its_budget_is_spent(tooled: Api, more: dict[str, Any]) -> None:
    free = tooled.answer(CHAT, **THINKS, **GREEDY)
    needed = free["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert needed > 8
    for budget in (0, 1, 5):
        fields = {**THINKS, **GREEDY, **more, "thinking_token_budget": budget, "n": 2}
        whole = tooled.answer(CHAT, **fields)
        message = whole["choices"][0]["message"]
        spent = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert spent < needed and (message["content"] or message.get("tool_calls"))
        if not more:
            assert (free["choices"][0]["message"]["reasoning_content"]).startswith(message["reasoning_content"] or "")
        streamed = joined(tooled.stream(CHAT, **{**fields, "n": 1}))
        assert (streamed.get("reasoning_content") or "") == (message["reasoning_content"] or "")
        assert (streamed.get("content") or "") == (message["content"] or "")
    for budget in (-1, 10_000):
        fields = {**THINKS, **GREEDY, "thinking_token_budget": budget}
        assert tooled.answer(CHAT, **fields)["choices"] == free["choices"]


def test_a_budget_needs_a_reasoning_parser(plain: Api) -> None:
    response = plain.post(CHAT, {"model": "demo", **THINKS, "thinking_token_budget": 5})
    assert response.status_code == 400 and "--reasoning-parser" in response.json()["error"]["message"]
    assert plain.post(CHAT, {"model": "demo", **THINKS, "thinking_token_budget": -1}).status_code == 200


def test_the_budget_of_messages_needs_a_reasoning_parser(plain: Api) -> None:
    body = {"model": "demo", "messages": THINKS["messages"], "max_tokens": 8}
    response = plain.post("/v1/messages", {**body, "thinking": {"type": "enabled", "budget_tokens": 2000}})
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and "thinking.budget_tokens" in message and "--reasoning-parser" in message
    for thinking in ({"type": "disabled"}, {"type": "adaptive"}):
        assert plain.post("/v1/messages", {**body, "thinking": thinking}).status_code == 200
    counted = plain.post("/v1/messages/count_tokens", {**body, "thinking": {"type": "enabled", "budget_tokens": 2000}})
    assert counted.status_code == 200


def test_the_budget_of_messages(tooled: Api) -> None:
    body = {"messages": THINKS["messages"], "max_tokens": 80, "temperature": 0}
    free, held = (
        tooled.answer("/v1/messages", **body, thinking={"type": "enabled", "budget_tokens": budget})["content"]
        for budget in (2000, 3)
    )
    assert held[0]["type"] == "thinking" and held[-1]["type"] == "text"
    assert free[0]["thinking"].startswith(held[0]["thinking"]) and len(held[0]["thinking"]) < len(free[0]["thinking"])
    wrong = {"model": "demo", **body, "thinking": {"type": "enabled", "budget_tokens": 0}}
    assert tooled.post("/v1/messages", wrong).status_code == 400
