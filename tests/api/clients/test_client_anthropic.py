"""The anthropic client on a live server: messages whole and streamed, tools, thinking, token counts, exceptions."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from client_cases import CAPITAL, CITY_SCHEMA, FORECAST, SUM, Size

FIELDS: dict[str, Any] = {"model": "demo", "max_tokens": 80, "extra_body": {"temperature": 0}}
TOOL: dict[str, Any] = {"name": "get_weather", "description": "Weather", "input_schema": CITY_SCHEMA}
THINKING = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def client(address: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, api_key="key", max_retries=0, timeout=60)


def kinds(message: anthropic.types.Message) -> list[str]:
    return [block.type for block in message.content]


def num_input(message: anthropic.types.Message) -> int:
    """Tokens of the prompt, read from the cache or not."""
    return message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_messages_whole_and_streamed(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**FIELDS, messages=CAPITAL)
    assert kinds(whole) == ["text"] and "Paris" in whole.content[0].text and whole.stop_reason == "end_turn"
    with client.messages.stream(**FIELDS, messages=CAPITAL) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    cut = client.messages.create(**FIELDS | {"max_tokens": 2}, system="Be short.", messages=CAPITAL)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2
    stopped = client.messages.create(**FIELDS, messages=CAPITAL, stop_sequences=["Par"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Par")


@pytest.mark.parametrize("choice", ["auto", "any", "tool"])
def test_tools_and_the_answer_to_their_result(client: anthropic.Anthropic, choice: str) -> None:
    name = {"name": "get_weather"} if choice == "tool" else {}
    tool_choice = {"type": choice, "disable_parallel_tool_use": True, **name}
    fields: dict[str, Any] = {**FIELDS, "messages": FORECAST, "tools": [TOOL], "tool_choice": tool_choice}
    message = client.messages.create(**fields)
    call = message.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    with client.messages.stream(**fields) as stream:
        assert stream.get_final_message().content[-1].input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"weather": "sunny"}'}
    history = [*FORECAST, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert kinds(client.messages.create(**FIELDS, messages=history, tools=[TOOL])) == ["text"]


def test_thinking(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**FIELDS | {"max_tokens": 1100}, messages=SUM, thinking=THINKING)
    assert kinds(message) == ["thinking", "text"] and "19" in message.content[1].text
    with client.messages.stream(**FIELDS | {"max_tokens": 1100}, messages=SUM, thinking=THINKING) as stream:
        types = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].thinking == message.content[0].thinking and "thinking" in types
    history = [*SUM, {"role": "assistant", "content": message.content}, *CAPITAL]
    assert "Paris" in client.messages.create(**FIELDS, messages=history).content[-1].text


def test_structured_output(client: anthropic.Anthropic) -> None:
    assert isinstance(client.messages.parse(**FIELDS, messages=CAPITAL, output_format=Size).parsed_output, Size)
    output = {"format": {"type": "json_schema", "schema": CITY_SCHEMA}, "effort": "low"}
    with client.messages.stream(**FIELDS, messages=CAPITAL, output_config=output) as stream:
        assert json.loads(stream.get_final_text()) in ({"city": "Paris"}, {"city": "Rome"})


def test_an_answer_goes_on_behind_its_begin(client: anthropic.Anthropic) -> None:
    begun = [*CAPITAL, {"role": "assistant", "content": "The capital of France"}]
    whole = client.messages.create(**FIELDS, messages=begun)
    assert whole.content[0].text == " is Paris."
    assert client.messages.count_tokens(model="demo", messages=begun).input_tokens == num_input(whole)


def test_count_tokens(client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"messages": FORECAST, "tools": [TOOL], "system": "Be short."}
    assert client.messages.count_tokens(model="demo", **fields).input_tokens == num_input(
        client.messages.create(**FIELDS, **fields)
    )


async def test_async(address: str) -> None:
    async with anthropic.AsyncAnthropic(base_url=address, api_key="key", max_retries=0) as client:
        whole = await client.messages.create(**FIELDS, messages=CAPITAL)
        async with client.messages.stream(**FIELDS, messages=CAPITAL) as stream:
            assert (await stream.get_final_text()) == whole.content[0].text


def test_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


ERRORS: dict[str, tuple[type[anthropic.APIStatusError], dict[str, Any]]] = {
    "field": (anthropic.BadRequestError, {"extra_body": {"temperature": 3}}),
    "context": (anthropic.BadRequestError, {"max_tokens": 10**6}),
    "model": (anthropic.NotFoundError, {"model": "nobody"}),
    "large": (anthropic.RequestTooLargeError, {"messages": [{"role": "user", "content": "x" * 300_000}]}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_its_exceptions(client: anthropic.Anthropic, case: str, stream: bool) -> None:
    kind, fields = ERRORS[case]
    with pytest.raises(kind) as caught:
        client.messages.create(**{**FIELDS, "messages": CAPITAL, **fields}, stream=stream, timeout=60)
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["message"]


def test_a_wrong_key(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**FIELDS, messages=CAPITAL)
    bearer = anthropic.Anthropic(base_url=str(client.base_url), auth_token="key", max_retries=0)
    assert "Paris" in bearer.messages.create(**FIELDS, messages=CAPITAL).content[0].text
