"""Routes beside the answers: other tasks, SageMaker's door, the description of bodies."""

from __future__ import annotations

import json
import re

import pytest
from api_client import MESSAGES, Api, api

__all__ = ["api"]
OTHERS = {
    "/v1/embeddings": "Embeddings", "/pooling": "Pooling", "/classify": "Classification", "/score": "Score",
    "/v1/score": "Score", "/rerank": "Rerank (Score)", "/v1/rerank": "Rerank (Score)", "/v2/rerank": "Rerank (Score)",
    "/v1/audio/transcriptions": "Transcriptions", "/v1/audio/translations": "Translations",
    "/v1/audio/speech": "Speech", "/v1/images/generations": "Images", "/v1/images/edits": "Images",
    "/v1/images/variations": "Images", "/v1/moderations": "Moderations",
}  # fmt: skip


@pytest.mark.parametrize("path", OTHERS)
def test_routes_of_another_task_say_so(api: Api, path: str) -> None:
    for options in ({"body": {"model": "demo", "input": "x"}}, {"content": b"RIFF"}):
        response = api.call("POST", path, **options)
        error = response.json()["error"]
        assert response.status_code == 400 and error["message"] == f"The model does not support {OTHERS[path]} API"
        assert error["type"] == "invalid_request_error"


def test_every_body_is_described(api: Api) -> None:
    document = api.call("GET", "/openapi.json").json()
    posts = {path: methods["post"] for path, methods in document["paths"].items() if "post" in methods}
    bodies = {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/invocations"}
    assert bodies <= set(posts)
    for path in bodies:
        schema = posts[path]["requestBody"]["content"]["application/json"]["schema"]
        assert posts[path]["requestBody"]["required"] and (schema.get("anyOf") or schema["$ref"])
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert references <= set(schemas) and "$defs" not in text and "HTTPValidationError" not in text
    assert {"prompt", "suffix", "best_of", "logits_processors"} <= set(schemas["CompletionRequest"]["properties"])
    assert {"messages", "top_logprobs", "stream_options"} <= set(schemas["ChatRequest"]["properties"])


def test_invocations_are_chats_or_completions(api: Api) -> None:
    chat = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0}
    assert api.answer("/invocations", **chat)["object"] == "chat.completion"
    assert api.answer("/invocations", prompt="Hi", max_tokens=1)["object"] == "text_completion"
    assert api.stream("/invocations", **chat)[0]["object"] == "chat.completion.chunk"
    assert api.post("/invocations", {"model": "demo"}).json()["error"]["param"] == "prompt"
    assert api.post("/invocations", {"model": "demo", "messages": 5}).json()["error"]["param"] == "messages"
    for content in (b"[", b"[1]", b""):
        headers = {"content-type": "application/json"}
        assert api.call("POST", "/invocations", content=content, headers=headers).status_code == 400
    assert api.call("POST", "/invocations", content=b"{}").status_code == 415


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_ids_of_answers_are_the_clients(api: Api, path: str) -> None:
    fields = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": MESSAGES}
    prefix = "cmpl-" if path == "/v1/completions" else "chatcmpl-"
    assert api.answer(path, **fields, max_tokens=1, request_id="mine")["id"] == prefix + "mine"
    assert {event["id"] for event in api.stream(path, **fields, max_tokens=2, request_id="it")} == {prefix + "it"}
    body = {**fields, "max_tokens": 1, "request_id": "mine"}
    response = api.call("POST", path, body, headers={"x-request-id": "sent"})
    assert response.json()["id"] == prefix + "sent"
