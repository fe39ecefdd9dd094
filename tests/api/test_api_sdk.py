"""Answers as OpenAI's own client reads them: its types, strictly, and its streams."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from api_client import MESSAGES, Api, api
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

__all__ = ["api"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMMON: list[dict[str, Any]] = [
    {}, {"n": 2, "temperature": 1.0, "seed": 1}, {"stop": "is"}, {"max_tokens": 1}, {"return_token_ids": True},
    {"use_beam_search": True, "n": 2}, {"prompt_logprobs": 1}, {"ignore_eos": True, "min_tokens": 3},
    {"best_of": 3, "n": 2, "temperature": 1.0, "seed": 1},
]  # fmt: skip
CHATS = [*COMMON, {"logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {"max_completion_tokens": 2}]
TEXTS = [*COMMON, {"logprobs": 2}, {"logprobs": 0}, {"prompt": ["a", "b"]}, {"prompt": [5, 6]}, {"suffix": ""}]


@pytest.fixture(scope="module")
def detailed() -> Iterator[Api]:
    opened = Api(enable_prompt_tokens_details=True)
    yield opened
    opened.close()


@pytest.mark.parametrize("fields", CHATS, ids=str)
def test_chats_are_of_their_types(api: Api, fields: dict[str, Any]) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, **fields}
    answer = ChatCompletion.model_validate(api.answer(CHAT, **fields), strict=True)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    if fields.get("prompt_logprobs") or fields.get("best_of"):
        return
    events = api.stream(CHAT, **fields, stream_options={"include_usage": True})
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    assert chunks[-1].usage == answer.usage
    assert all("usage" in event and event["usage"] is None for event in events[:-1])


@pytest.mark.parametrize("fields", TEXTS, ids=str)
def test_completions_are_of_their_types(api: Api, fields: dict[str, Any]) -> None:
    fields = {"prompt": "The sky", "max_tokens": 4, "temperature": 0, **fields}
    answer = Completion.model_validate(api.answer(COMPLETIONS, **fields), strict=True)
    if fields.get("prompt_logprobs"):
        return
    events = api.stream(COMPLETIONS, **fields, stream_options={"include_usage": True})
    for event in events:
        for choice in event["choices"]:  # the type knows no stream
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(event, strict=True)
    assert Completion.model_validate(events[-1], strict=True).usage == answer.usage


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_cached_tokens_are_a_number(detailed: Api, path: str) -> None:
    messages = [{"role": "user", "content": "a " * 40}]
    prompt = {"prompt": "a b c " * 20} if path == COMPLETIONS else {"messages": messages}
    counts = []
    for _ in range(2):
        usage = detailed.answer(path, **prompt, max_tokens=1)["usage"]
        streamed = detailed.stream(path, **prompt, max_tokens=1, stream_options={"include_usage": True})[-1]["usage"]
        counts.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert type(counts[-1]) is int and streamed["prompt_tokens_details"]["cached_tokens"] >= 16
    assert counts[0] == 0 and counts[1] >= 16


def ask(api: Api, call: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    """Runs a call of the client on the application, without sockets."""

    async def run() -> Any:
        transport = httpx2.ASGITransport(api._llm._app)
        async with httpx2.AsyncClient(transport=transport) as http:
            return await call(openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http))

    return api._llm._call(run())


def test_text_adds_up_without_a_null_and_the_end_comes_with_the_last_token(api: Api) -> None:
    fields = {"model": "demo", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True}

    async def stream(client: openai.AsyncOpenAI) -> tuple[str, list[Any]]:
        text, chunks = "", []
        async for chunk in await client.chat.completions.create(
            **fields, stream=True, extra_body={"return_token_ids": True, "ignore_eos": True}
        ):
            text += chunk.choices[0].delta.content
            chunks.append(chunk)
        return text, chunks

    text, chunks = ask(api, stream)
    whole = ask(api, lambda client: client.chat.completions.create(**fields, extra_body={"ignore_eos": True}))
    assert text == whole.choices[0].message.content
    assert len(chunks) == 1 + 6, "the role, then a chunk a token"
    assert [len(chunk.choices[0].token_ids) for chunk in chunks[1:]] == [1] * 6
    assert [len(chunk.choices[0].logprobs.content) for chunk in chunks[1:]] == [1] * 6
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 6 + ["length"]
    assert chunks[0].prompt_token_ids and all("prompt_token_ids" not in chunk.model_extra for chunk in chunks[1:])


def test_completions_stream_the_prompts_tokens_first(api: Api) -> None:
    fields = {"prompt": [[343, 1364], [5, 6, 7]], "n": 2, "max_tokens": 3, "temperature": 1.0, "ignore_eos": True}
    whole = api.answer(COMPLETIONS, **fields, seed=1, return_token_ids=True)["choices"]
    chunks: dict[int, list[dict[str, Any]]] = {}
    for event in api.stream(COMPLETIONS, **fields, seed=1, return_token_ids=True):
        chunks.setdefault(event["choices"][0]["index"], []).append(event["choices"][0])
    for choice in whole:
        first, *others = chunks[choice["index"]]
        assert first["prompt_token_ids"] == choice["prompt_token_ids"] and len(others) == 2
        assert all(chunk["prompt_token_ids"] is None for chunk in others)
        assert [token for chunk in (first, *others) for token in chunk["token_ids"]] == choice["token_ids"]


def test_errors_are_the_clients_exceptions(api: Api) -> None:
    def refused(kind: type[openai.APIStatusError], **fields: Any) -> dict[str, Any]:
        with pytest.raises(kind) as caught:
            ask(api, lambda client: client.chat.completions.create(**{"model": "demo", "messages": MESSAGES, **fields}))
        return caught.value.body

    assert refused(openai.NotFoundError, model="nobody")["code"] == "model_not_found"
    assert refused(openai.BadRequestError, temperature=3)["param"] == "temperature"
    too_long = refused(openai.BadRequestError, max_completion_tokens=10**6)
    assert too_long["param"] == "max_completion_tokens" and too_long["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="does not support Embeddings API"):
        ask(api, lambda client: client.embeddings.create(model="demo", input="x"))
