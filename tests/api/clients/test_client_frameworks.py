"""LangChain, LiteLLM and Instructor on a live server, with their usual features, whole, streamed and asynchronous."""

from __future__ import annotations

import json
from typing import Any, Literal

import instructor
import litellm
import openai
import pytest
from client_cases import CAPITAL, FORECAST, GREEDY, NAMED, SUM, WEATHER, Size
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

IN_ONE_LOOP = pytest.mark.asyncio(loop_scope="module")  # LangChain and LiteLLM keep their connections between tests
WEATHER_OF = {"name": "get_weather", "args": {"city": "Paris"}}


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Weather"""
    return json.dumps({"weather": f"sunny in {city}"})


@pytest.fixture(scope="module")
def chat(address: str) -> ChatOpenAI:
    where = {"base_url": f"{address}/v1", "api_key": "key", "model": "demo"}
    return ChatOpenAI(**where, temperature=0, max_tokens=80, max_retries=0)


@pytest.fixture(scope="module")
def lite(address: str) -> dict[str, Any]:
    return {**GREEDY, "model": "openai/demo", "api_base": f"{address}/v1", "api_key": "key", "num_retries": 0}


@IN_ONE_LOOP
async def test_langchain_chat(chat: ChatOpenAI) -> None:
    whole = chat.invoke("What is the capital of France?")
    assert "Paris" in whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("What is the capital of France?")) == whole.content
    assert (await chat.ainvoke("What is the capital of France?")).content == whole.content
    assert [answer.content for answer in chat.batch(["What is the capital of France?"] * 3)] == [whole.content] * 3
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke("What is the capital of France?")
    assert len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_langchain_completions(address: str) -> None:
    llm = OpenAI(base_url=f"{address}/v1", api_key="key", model="demo", temperature=0, max_tokens=8, max_retries=0)
    assert "".join(llm.stream("Once upon a time")) == llm.invoke("Once upon a time")


@pytest.mark.parametrize("choice", ["auto", "required", "any", "get_weather"])
def test_langchain_tools(chat: ChatOpenAI, choice: str) -> None:
    bound = chat.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
    called = bound.invoke(FORECAST)
    assert [{"name": call["name"], "args": call["args"]} for call in called.tool_calls] == [WEATHER_OF]
    streamed = AIMessageChunk("")
    for chunk in bound.stream(FORECAST):
        streamed += chunk
    assert [{"name": call["name"], "args": call["args"]} for call in streamed.tool_calls] == [WEATHER_OF]
    result: ToolMessage = get_weather.invoke(called.tool_calls[0])
    answer = chat.bind_tools([get_weather]).invoke([HumanMessage(FORECAST[0]["content"]), called, result])
    assert answer.content and not answer.tool_calls


@IN_ONE_LOOP
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
async def test_langchain_structured_output(chat: ChatOpenAI, method: str) -> None:
    if method == "json_mode":
        shaped = chat.with_structured_output(method=method, include_raw=True).invoke("A JSON object, please.")
        assert shaped["parsed"] is not None or shaped["raw"].response_metadata["finish_reason"] == "length"
        return
    shaped = chat.with_structured_output(Size, method=method, strict=True)
    assert isinstance(shaped.invoke(CAPITAL), Size)
    assert isinstance(await shaped.ainvoke(CAPITAL), Size)


def test_langchain_on_the_responses_api(address: str) -> None:
    chat = ChatOpenAI(
        base_url=f"{address}/v1", api_key="key", model="demo", temperature=0, max_tokens=80, use_responses_api=True
    )
    whole = chat.invoke(CAPITAL)
    assert "Paris" in whole.text
    assert "".join(chunk.text for chunk in chat.stream(CAPITAL)) == whole.text
    called = chat.bind_tools([get_weather]).invoke(FORECAST)
    assert [call["args"] for call in called.tool_calls] == [{"city": "Paris"}]
    result = get_weather.invoke(called.tool_calls[0])
    assert chat.bind_tools([get_weather]).invoke([*FORECAST, called, result]).text
    assert isinstance(chat.with_structured_output(Size).invoke(CAPITAL), Size)


@IN_ONE_LOOP
async def test_litellm_chat(lite: dict[str, Any]) -> None:
    whole = litellm.completion(**lite, messages=CAPITAL)
    text = whole.choices[0].message.content
    assert "Paris" in text
    chunks = list(litellm.completion(**lite, messages=CAPITAL, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    streamed = [chunk async for chunk in await litellm.acompletion(**lite, messages=CAPITAL, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    scored = litellm.completion(**lite, messages=CAPITAL, logprobs=True, top_logprobs=2)
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2
    shaped = litellm.completion(**lite, messages=CAPITAL, response_format=Size)
    Size.model_validate_json(shaped.choices[0].message.content)


def test_litellm_hosted_vllm_thinks(lite: dict[str, Any]) -> None:
    fields = {**lite, "model": "hosted_vllm/demo", "chat_template_kwargs": {"enable_thinking": True}}
    message = litellm.completion(**fields, messages=SUM).choices[0].message
    assert "12" in message.reasoning_content and "19" in message.content


@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=str)
def test_litellm_tools(lite: dict[str, Any], choice: Any) -> None:
    fields = {**lite, "messages": FORECAST, "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    message = litellm.completion(**fields).choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}
    built = litellm.stream_chunk_builder(list(litellm.completion(**fields, stream=True)))
    assert json.loads(built.choices[0].message.tool_calls[0].function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"weather": "sunny"}'}
    answer = litellm.completion(**lite, messages=[*FORECAST, message, result], tools=[WEATHER])
    assert answer.choices[0].message.content


def test_litellm_other_routes(lite: dict[str, Any]) -> None:
    fields = {name: lite[name] for name in ("model", "api_base", "api_key")}
    assert litellm.responses(**fields, input="Hi", max_output_tokens=20, temperature=0).output
    messages = {"messages": CAPITAL, "max_tokens": 20, "model": "anthropic/demo", "api_key": "key"}
    answer = litellm.completion(**messages, api_base=fields["api_base"].removesuffix("/v1"))
    assert answer.choices[0].message.content
    text = litellm.text_completion(**fields | {"model": "text-completion-openai/demo"}, prompt="The sky", max_tokens=4)
    assert text.choices[0].text


ERRORS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "field": (litellm.BadRequestError, {"temperature": 3}),
    "context": (litellm.ContextWindowExceededError, {"max_tokens": 10**6}),
    "model": (litellm.NotFoundError, {"model": "openai/nobody"}),
    "full": (litellm.RateLimitError, {"n": 20, "temperature": 1}),
    "key": (litellm.AuthenticationError, {"api_key": "wrong"}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_litellms_exceptions(lite: dict[str, Any], case: str) -> None:
    kind, fields = ERRORS[case]
    with pytest.raises(kind):
        litellm.completion(**{**lite, "messages": CAPITAL, **fields})


MODES = [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS]


@IN_ONE_LOOP
@pytest.mark.parametrize("mode", MODES, ids=str)
async def test_instructor(address: str, mode: instructor.Mode) -> None:
    where = {"base_url": f"{address}/v1", "api_key": "key", "max_retries": 0}
    fields: dict[str, Any] = {**GREEDY, "messages": CAPITAL, "max_retries": 0, "response_model": Size}
    if mode is instructor.Mode.RESPONSES_TOOLS:
        fields["max_output_tokens"] = fields.pop("max_tokens")
    client = instructor.from_openai(openai.OpenAI(**where), mode=mode)
    size = client.chat.completions.create(**fields)
    assert isinstance(size, Size)
    assert list(client.chat.completions.create_partial(**fields))[-1].model_dump() == size.model_dump()
    asynchronous = instructor.from_openai(openai.AsyncOpenAI(**where), mode=mode)
    assert (await asynchronous.chat.completions.create(**fields)).model_dump() == size.model_dump()
