"""A streamed answer, put together, is the whole answer: text, tokens, log-probabilities, reasons and usage."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import MESSAGES, Api, api

__all__ = ["api"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OPTIONS: list[dict[str, Any]] = [
    {}, {"n": 3, "temperature": 1.0, "seed": 5}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1},
    {"stop": "is", "max_tokens": 30}, {"stop": ["t", "zzz"], "include_stop_str_in_output": True},
    {"ignore_eos": True, "max_tokens": 60}, {"temperature": 2.0, "seed": 3, "ignore_eos": True, "max_tokens": 60},
    {"prompt": ["The sky is", "What is"], "n": 2, "temperature": 1.0, "seed": 1}, {"min_tokens": 9, "max_tokens": 12},
]  # fmt: skip


def join(events: list[dict[str, Any]], key: str) -> dict[int, dict[str, Any]]:
    """Per choice: text, finish and stop reason, and the logprobs of its chunks in order."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (c for event in events for c in event["choices"]):
        joined = choices.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": []})
        joined["text"] += choice.get("text") or (choice.get("delta") or {}).get(key) or ""
        joined["finish_reason"] = choice["finish_reason"] or joined["finish_reason"]
        joined["logprobs"].append(choice.get("logprobs"))
    return choices


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streamed_completions_are_the_whole_ones(api: Api, options: dict[str, Any]) -> None:
    fields = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0.0, **options}
    whole = api.answer(COMPLETIONS, **fields)
    events = api.stream(COMPLETIONS, **fields, stream_options={"include_usage": True})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    choices = join(events, "text")
    assert sorted(choices) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        joined = choices[choice["index"]]
        assert joined["text"] == choice["text"] and joined["finish_reason"] == choice["finish_reason"]
        if choice["logprobs"]:
            for name in ("tokens", "token_logprobs", "text_offset"):
                parts = [value for part in joined["logprobs"] if part for value in part[name]]
                assert parts == choice["logprobs"][name], name


@pytest.mark.parametrize(
    "options",
    [
        {}, {"n": 2, "temperature": 1.0, "seed": 2}, {"logprobs": True, "top_logprobs": 3}, {"stop": ["Par"]},
        {"max_tokens": 3},
    ],
    ids=str,
)  # fmt: skip
def test_streamed_chat_is_the_whole_one(api: Api, options: dict[str, Any]) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0.0, **options}
    whole = api.answer(CHAT, **fields)
    events = api.stream(CHAT, **fields, stream_options={"include_usage": True})
    assert events[0]["choices"][0]["delta"]["role"] == "assistant" and events[-1]["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1 and {event["object"] for event in events} == {
        "chat.completion.chunk"
    }
    choices = join(events, "content")
    for choice in whole["choices"]:
        joined = choices[choice["index"]]
        assert joined["text"] == choice["message"]["content"] and joined["finish_reason"] == choice["finish_reason"]
        if choice["logprobs"]:
            parts = [entry for part in joined["logprobs"] if part for entry in part["content"]]
            assert parts == choice["logprobs"]["content"]


def test_stop_strings_end_the_text_where_they_begin(api: Api) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0.0}
    text = api.answer(CHAT, **fields)["choices"][0]["message"]["content"]
    for begin in range(1, len(text) - 2):
        stop = text[begin : begin + 3]
        choice = api.answer(CHAT, **fields, stop=stop)["choices"][0]
        assert choice["message"]["content"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == stop


def test_characters_of_several_tokens_come_whole(api: Api) -> None:
    """Bytes of one character are spread over chunks of a stream; half of one is never sent."""
    ids = api.post("/tokenize", {"model": "demo", "prompt": "\u2603\U0001f600", "add_special_tokens": False}).json()[
        "tokens"
    ]
    assert len(ids) > 2
    text = ""
    bias = {str(i): 100 for i in ids}
    for event in api.stream(
        COMPLETIONS, prompt="x", max_tokens=64, temperature=1.0, seed=4, logit_bias=bias, ignore_eos=True
    ):
        for choice in event["choices"]:
            text += choice["text"]
    whole = api.answer(
        COMPLETIONS, prompt="x", max_tokens=64, temperature=1.0, seed=4, logit_bias=bias, ignore_eos=True
    )["choices"][0]["text"]
    assert text == whole and text


def test_usage_with_every_chunk(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = api.stream(
        COMPLETIONS, prompt="The sky", max_tokens=6, temperature=0, ignore_eos=True, stream_options=options
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 6 and all(event["usage"]["prompt_tokens"] for event in events)


def test_chunks_of_several_tokens(caplog: pytest.LogCaptureFixture) -> None:
    spaced = Api(stream_interval=4, enable_log_outputs=True, max_log_len=9)
    try:
        fields = {"prompt": "The sky", "max_tokens": 11, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        with caplog.at_level("INFO", "fuseline"):
            whole = spaced.answer(COMPLETIONS, **fields)["choices"][0]
        assert f"output 0 {whole['text'][:9]!r}, length" in caplog.text
        chunks = [c for event in spaced.stream(COMPLETIONS, **fields) for c in event["choices"]]
    finally:
        spaced.close()
    assert [len(chunk["token_ids"]) for chunk in chunks if chunk.get("token_ids")] == [1, 4, 4, 2]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
