"""/v1/responses and /v1/messages on the wire: the same answers as chat's, in other shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_client import Api
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

QUESTION = "What is the weather in Paris?"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "get_weather", "description": "Weather", "parameters": CITY}
ASK = {"input": QUESTION, "tools": [TOOL], "temperature": 0, "max_output_tokens": 80}
THINK = {"input": "What is 12 plus 7?", "temperature": 0, "max_output_tokens": 80,
         "chat_template_kwargs": {"enable_thinking": True}}  # fmt: skip
BLOCK_TOOL = {"name": "get_weather", "description": "Weather", "input_schema": CITY}
MESSAGE_ASK = {
    "messages": [{"role": "user", "content": QUESTION}], "tools": [BLOCK_TOOL], "temperature": 0, "max_tokens": 80,
}  # fmt: skip
MESSAGE_THINK = {
    "messages": [{"role": "user", "content": "What is 12 plus 7?"}], "thinking": {"type": "adaptive"}, "temperature": 0,
    "max_tokens": 80,
}  # fmt: skip


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    opened = Api(enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3", api_key=["k"])
    yield opened
    opened.close()


def post(api: Api, path: str, status: int = 200, **fields: Any) -> Any:
    headers = {"x-api-key": "k"} if path.startswith("/v1/messages") else {"authorization": "Bearer k"}
    response = api.call("POST", path, {"model": "demo", **fields}, headers=headers)
    assert response.status_code == status, response.text
    return response


def events(api: Api, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Events of a stream, each under its own name."""
    found = []
    for block in post(api, path, stream=True, **fields).text.split("\n\n"):
        if block:
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize("fields", [ASK, THINK, {**ASK, "tools": None}], ids=["call", "thoughts", "text"])
def test_a_response_streamed_and_whole(api: Api, fields: dict[str, Any]) -> None:
    whole = post(api, "/v1/responses", **fields).json()
    Response.model_validate(whole)
    found = events(api, "/v1/responses", **fields)
    for event in found:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    last = found[-1]["response"]
    assert found[-1]["type"] == "response.completed"
    assert last["usage"]["output_tokens_details"] == whole["usage"]["output_tokens_details"]
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert [plain(item) for item in last["output"]] == [plain(item) for item in whole["output"]]
    assert [plain(event["item"]) for event in found if event["type"] == "response.output_item.done"] == [
        plain(item) for item in whole["output"]
    ]
    deltas = [event["delta"] for event in found if event["type"].endswith(".delta")]
    texts = [item.get("arguments") or item["content"][0]["text"] for item in whole["output"]]
    assert "".join(deltas) == "".join(texts) and len(deltas) > 3


def plain(item: dict[str, Any]) -> dict[str, Any]:
    """Without ids, which are made anew."""
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def test_what_a_response_holds(api: Api) -> None:
    (call,) = post(api, "/v1/responses", **ASK).json()["output"]
    assert call["type"] == "function_call" and json.loads(call["arguments"]) == {"city": "Paris"}
    thought, message = post(api, "/v1/responses", **THINK).json()["output"]
    assert thought["type"] == "reasoning" and "12" in thought["content"][0]["text"]
    assert message["role"] == "assistant" and "19" in message["content"][0]["text"]
    cut = post(api, "/v1/responses", **{**THINK, "max_output_tokens": 5}).json()
    assert cut["status"] == "incomplete" and cut["incomplete_details"] == {"reason": "max_output_tokens"}
    listed = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    assert plain(post(api, "/v1/responses", **{**ASK, "input": listed}).json()["output"][0]) == plain(call)


def test_responses_are_kept_and_gone_on_from(api: Api) -> None:
    first = post(api, "/v1/responses", **ASK).json()
    headers = {"authorization": "Bearer k"}
    assert api.call("GET", f"/v1/responses/{first['id']}", headers=headers).json() == first
    result = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "sunny, 20 degrees"}
    more = {**ASK, "input": [result], "previous_response_id": first["id"]}
    second = post(api, "/v1/responses", **more).json()
    assert "sunny" in second["output"][0]["content"][0]["text"] and second["previous_response_id"] == first["id"]
    same = {**ASK, "input": [{"role": "user", "content": QUESTION}, first["output"][0], result]}
    assert plain(post(api, "/v1/responses", **same).json()["output"][0]) == plain(second["output"][0])
    unkept = post(api, "/v1/responses", **ASK, store=False).json()
    for id in (unkept["id"], "resp_none"):
        assert api.call("GET", f"/v1/responses/{id}", headers=headers).status_code == 404
        assert post(api, "/v1/responses", 404, input="x", previous_response_id=id)
    assert api.call("DELETE", f"/v1/responses/{first['id']}", headers=headers).json()["deleted"]
    assert api.call("GET", f"/v1/responses/{first['id']}", headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"), ({"input": []}, "input"), ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"), ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "x", "context_management": [{"type": "compaction"}]}, "context_management"),
        ({"input": "x", "background": True}, "background"), ({"input": "x", "truncation": "x"}, "truncation"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "max_output_tokens": 10**9}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ],
)  # fmt: skip
def test_refused_responses_name_the_field(api: Api, fields: dict[str, Any], param: str) -> None:
    assert post(api, "/v1/responses", 400, **fields).json()["error"]["param"] == param


MEDIA = {
    "image_url": ("/v1/chat/completions", {"image_url": {"url": "data:image/png;base64,AA=="}}, "images"),
    "image": ("/v1/chat/completions", {"image": "x.png"}, "images"),
    "input_audio": ("/v1/chat/completions", {"input_audio": {"data": "AA==", "format": "wav"}}, "audio"),
    "audio_url": ("/v1/chat/completions", {"audio_url": {"url": "x.wav"}}, "audio"),
    "video_url": ("/v1/chat/completions", {"video_url": {"url": "x.mp4"}}, "videos"),
    "file": ("/v1/chat/completions", {"file": {"file_id": "f"}}, "files"),
    "input_image": ("/v1/responses", {"image_url": "x.png"}, "images"),
    "input_file": ("/v1/responses", {"file_id": "f"}, "files"),
    "image block": ("/v1/messages", {"source": {"type": "url", "url": "x.png"}}, "images"),
    "document block": ("/v1/messages", {"source": {"type": "url", "url": "x.pdf"}}, "files"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEDIA)
def test_media_are_refused_and_said_to_be_not_served_yet(api: Api, kind: str) -> None:
    path, fields, media = MEDIA[kind]
    name = "input" if path == "/v1/responses" else "messages"
    text = "input_text" if path == "/v1/responses" else "text"
    parts = [{"type": text, "text": "hi"}, {"type": kind.removesuffix(" block"), **fields}]
    asked: dict[str, Any] = {name: [{"role": "user", "content": parts}]}
    more = {"max_tokens": 2} if path == "/v1/messages" else {}
    message = post(api, path, 400, **asked, **more).json()["error"]["message"]
    assert f"{name}[0].content[1]" in message and f"this model's {media} are not served yet" in message


@pytest.mark.parametrize("kind", ["image_url", "input_audio"])
def test_a_medium_without_a_type_is_told_by_its_key(api: Api, kind: str) -> None:
    messages = [{"role": "user", "content": [{kind: {"url": "x"}}]}]
    error = post(api, "/v1/chat/completions", 400, messages=messages).json()["error"]
    assert error["param"] == "messages[0].content[0]" and "not served yet" in error["message"]


@pytest.mark.parametrize(
    "fields", [MESSAGE_ASK, MESSAGE_THINK, {**MESSAGE_ASK, "tools": None}], ids=["call", "thoughts", "text"]
)
def test_a_message_streamed_and_whole(api: Api, fields: dict[str, Any]) -> None:
    whole = post(api, "/v1/messages", **fields).json()
    found = events(api, "/v1/messages", **fields)
    assert found[0]["type"] == "message_start" and found[0]["message"]["content"] == []
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]
    assert found[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    blocks: list[dict[str, Any]] = []
    for event in found[1:-2]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            for name, text in event["delta"].items():
                if name != "type":
                    key = "json" if name == "partial_json" else name
                    blocks[event["index"]][key] = blocks[event["index"]].get(key, "") + text
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("json"))
    assert [plain(block) for block in blocks] == [plain(block) for block in whole["content"]]
    assert whole["usage"]["output_tokens"] == found[-2]["usage"]["output_tokens"]


def test_what_a_message_holds(api: Api) -> None:
    whole = post(api, "/v1/messages", **MESSAGE_ASK).json()
    (use,) = whole["content"]
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "tool_use")
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "get_weather", {"city": "Paris"})
    history = [
        *MESSAGE_ASK["messages"], {"role": "assistant", "content": [use]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": "sunny, 20"}]},
    ]  # fmt: skip
    answer = post(api, "/v1/messages", **{**MESSAGE_ASK, "messages": history}).json()
    assert "sunny" in answer["content"][0]["text"] and answer["stop_reason"] == "end_turn"
    thought, text = post(api, "/v1/messages", **MESSAGE_THINK).json()["content"]
    assert thought["type"] == "thinking" and "12" in thought["thinking"] and "19" in text["text"]
    cut = post(api, "/v1/messages", **{**MESSAGE_THINK, "max_tokens": 3}).json()
    assert cut["stop_reason"] == "max_tokens" and cut["usage"]["output_tokens"] == 3
    stopped = post(api, "/v1/messages", **{**MESSAGE_ASK, "tools": None, "stop_sequences": ["e"]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "e")


def test_tokens_are_counted(api: Api) -> None:
    fields = {"messages": MESSAGE_ASK["messages"], "system": "Answer briefly.", "tools": [BLOCK_TOOL]}
    counted = post(api, "/v1/messages/count_tokens", **fields).json()["input_tokens"]
    usage = post(api, "/v1/messages", **fields, max_tokens=1).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"container": "c"}, "container"), ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{}]}}, "context_management"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"tools": [{**BLOCK_TOOL, "strict": "x"}]}, "strict"),
    ],
)  # fmt: skip
def test_refused_messages_name_the_field(api: Api, fields: dict[str, Any], words: str) -> None:
    error = post(api, "/v1/messages", 400, **{**MESSAGE_ASK, **fields}).json()["error"]
    assert error["type"] == "invalid_request_error" and words in error["message"]


def test_refused_messages_have_anthropics_body(api: Api) -> None:
    for fields in ({}, {"messages": [], "max_tokens": 1}, {**MESSAGE_ASK, "tool_choice": {"type": "x"}}):
        body = post(api, "/v1/messages", 400, **fields).json()
        assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["error"]["message"]
    body = api.call("POST", "/v1/messages", {**MESSAGE_ASK, "model": "x"}, headers={"x-api-key": "k"}).json()
    assert body["error"]["type"] == "not_found_error"
    assert api.call("POST", "/v1/messages", MESSAGE_ASK).status_code == 401
