"""The openai client on a live server: its helpers, streams, tools, structured output, Responses API and exceptions."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest
from client_cases import CAPITAL, FORECAST, GREEDY, NAMED, SUM, WEATHER, Size

RESPONSE_TOOL = {"type": "function", **WEATHER["function"], "strict": True}
RESPONSE_FIELDS: dict[str, Any] = {"model": "demo", "temperature": 0, "max_output_tokens": 80}


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0, timeout=60)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat_whole_streamed_and_by_the_stream_helper(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, messages=CAPITAL)
    assert "Paris" in whole.choices[0].message.content and whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**GREEDY, messages=CAPITAL, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    with client.chat.completions.stream(**GREEDY, messages=CAPITAL) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert events.count("content.delta") > 3 and events.count("content.done") == 1


def test_completions_with_logprobs(client: openai.OpenAI) -> None:
    done = client.completions.create(**GREEDY | {"max_tokens": 4}, prompt=["The sky", "A dog"], logprobs=2)
    assert [choice.index for choice in done.choices] == [0, 1]
    assert all(len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == 4 for choice in done.choices)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {**GREEDY, "messages": CAPITAL, "logprobs": True, "top_logprobs": 3}
    if not stream:
        found = client.chat.completions.create(**fields).choices[0].logprobs.content
    else:
        with client.chat.completions.stream(**fields) as events:
            found = events.get_final_completion().choices[0].logprobs.content
    assert len(found) > 3 and all(len(token.top_logprobs) == 3 for token in found)
    assert all(token.token == token.top_logprobs[0].token and token.logprob <= 0 for token in found)


@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=str)
def test_tools_and_the_answer_to_their_result(client: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {**GREEDY, "messages": FORECAST, "tools": [WEATHER], "tool_choice": choice}
    message = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0].message
    call = message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    with client.chat.completions.stream(**fields, parallel_tool_calls=False) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert [call.function.arguments for call in streamed] == [call.function.arguments]
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    answer = client.chat.completions.create(**GREEDY, messages=[*FORECAST, message, result], tools=[WEATHER])
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_no_tool_where_none_is_chosen(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, messages=FORECAST, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_pydantic_tools_are_parsed(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Size)]
    fields: dict[str, Any] = {**GREEDY, "messages": CAPITAL, "tools": tools, "tool_choice": "required"}
    answer = client.chat.completions.parse(**fields, parallel_tool_calls=False)
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Size)


def test_structured_output(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(**GREEDY, messages=CAPITAL, response_format=Size)
    assert isinstance(whole.choices[0].message.parsed, Size)
    with client.chat.completions.stream(**GREEDY, messages=CAPITAL, response_format=Size) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == whole.choices[0].message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**GREEDY | {"max_tokens": 1}, messages=CAPITAL, response_format=Size)
    anything = client.chat.completions.create(
        **GREEDY | {"max_tokens": 200}, messages=CAPITAL, response_format={"type": "json_object"}
    ).choices[0]
    assert anything.finish_reason == "length" or isinstance(json.loads(anything.message.content), dict)


def test_reasoning_apart(client: openai.OpenAI) -> None:
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(**GREEDY, messages=SUM, extra_body=kwargs).choices[0].message
    assert "12" in message.reasoning_content and "19" in message.content


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(**RESPONSE_FIELDS, input="What is the capital of France?")
    assert "Paris" in whole.output_text and whole.status == "completed"
    events = list(client.responses.create(**RESPONSE_FIELDS, input="What is the capital of France?", stream=True))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and [event.sequence_number for event in events] == [*range(len(events))]
    with client.responses.stream(**RESPONSE_FIELDS, input="What is the capital of France?") as stream:
        assert stream.get_final_response().output_text == whole.output_text


def test_responses_parse_call_tools_and_go_on(client: openai.OpenAI) -> None:
    assert isinstance(client.responses.parse(**RESPONSE_FIELDS, input="A size?", text_format=Size).output_parsed, Size)
    asked = FORECAST[0]["content"]
    called = client.responses.create(**RESPONSE_FIELDS, input=asked, tools=[RESPONSE_TOOL])
    call = next(item for item in called.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Paris"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "sunny"}'}
    history = [*FORECAST, *called.output, result]
    assert client.responses.create(**RESPONSE_FIELDS, input=history, tools=[RESPONSE_TOOL]).output_text
    with client.responses.stream(**RESPONSE_FIELDS, input=asked, tools=[RESPONSE_TOOL]) as stream:
        types = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= types
    assert [item.arguments for item in final.output if item.type == "function_call"] == [call.arguments]


async def test_async(address: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0) as client:
        whole = await client.chat.completions.create(**GREEDY, messages=CAPITAL)
        text = ""
        async for chunk in await client.chat.completions.create(**GREEDY, messages=CAPITAL, stream=True):
            text += chunk.choices[0].delta.content
        assert text == whole.choices[0].message.content
        assert [model.id async for model in client.models.list()] == ["demo"]
        parsed = await client.chat.completions.parse(**GREEDY, messages=CAPITAL, response_format=Size)
        assert isinstance(parsed.choices[0].message.parsed, Size)
        assert "Paris" in (await client.responses.create(**RESPONSE_FIELDS, input=CAPITAL)).output_text


ERRORS: dict[str, tuple[type[openai.APIStatusError], dict[str, Any]]] = {
    "field": (openai.BadRequestError, {"temperature": 3}),
    "context": (openai.BadRequestError, {"max_tokens": 10**6}),
    "model": (openai.NotFoundError, {"model": "nobody"}),
    "full": (openai.RateLimitError, {"n": 20, "temperature": 1}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_its_exceptions(client: openai.OpenAI, case: str, stream: bool) -> None:
    kind, fields = ERRORS[case]
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**GREEDY, "messages": CAPITAL, **fields}, stream=stream)
    assert caught.value.body["message"] and caught.value.request_id


def test_errors_of_the_connection(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(**GREEDY, messages=CAPITAL)
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**GREEDY, prompt="x" * 300_000)
    assert caught.value.status_code == 413 and "--max-request-bytes" in caught.value.message
    with pytest.raises(openai.BadRequestError, match="does not support Embeddings API"):
        client.embeddings.create(model="demo", input="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.responses.create(model="demo", input="x", temperature=9)


def test_a_client_that_times_out_or_leaves_frees_its_place(client: openai.OpenAI) -> None:
    endless: dict[str, Any] = {"model": "demo", "messages": CAPITAL, "max_tokens": 1900}
    for _ in range(20):  # more than the server's places
        stream = client.chat.completions.create(**endless, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).chat.completions.create(**endless, extra_body={"ignore_eos": True})
    answers: list[str] = []

    def ask() -> None:
        answers.append(client.chat.completions.create(**GREEDY, messages=CAPITAL).choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 8 and all("Paris" in answer for answer in answers)
