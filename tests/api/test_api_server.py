"""Everything around the answers: keys, origins, request ids, tokens and templates, and what is listed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_client import MESSAGES, Api, api

__all__ = ["api"]
KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Api]:
    """A server with request ids and one allowed origin."""
    opened = Api(enable_request_id_headers=True, allowed_origins=["http://here"], served_model_name=["a", "b"])
    yield opened
    opened.close()


def test_listed_and_healthy(api: Api) -> None:
    model = api.call("GET", "/v1/models").json()["data"][0]
    assert model["id"] == "demo" and model["object"] == "model" and model["max_model_len"] > 0
    assert api.call("GET", "/health").status_code == 200
    assert set(api.call("GET", "/version").json()) >= {"version"}
    metrics = api.call("GET", "/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "prompt_tokens_total", "time_to_first_token_seconds"):
        assert f"fuseline:{name}" in metrics


def test_each_served_name_answers_under_the_first(guarded: Api) -> None:
    assert [model["id"] for model in guarded.call("GET", "/v1/models").json()["data"]] == ["a", "b"]
    for name in ("a", "b"):
        assert guarded.answer("/v1/completions", model=name, prompt="x", max_tokens=1)["model"] == "a"


def test_request_ids_come_back(guarded: Api) -> None:
    sent = guarded.call("GET", "/v1/models", headers={"x-request-id": "mine-1"})
    assert sent.headers["x-request-id"] == "mine-1"
    made = [guarded.call("GET", "/v1/models").headers["x-request-id"] for _ in range(2)]
    assert made[0] and made[0] != made[1]


def test_only_allowed_origins(guarded: Api) -> None:
    def allowed(origin: str) -> str | None:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        response = guarded.call("OPTIONS", "/v1/completions", headers=headers)
        return response.headers.get("access-control-allow-origin")

    assert allowed("http://here") == "http://here" and allowed("http://there") is None


def test_keys_guard_what_costs(tmp_path) -> None:
    guarded = Api(api_key=["secret", "other"])
    try:
        body = {"model": "demo", "prompt": "x", "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            response = guarded.call("POST", "/v1/completions", body, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"].startswith("Bearer")
        for key in ("Bearer secret", "bearer other"):
            assert guarded.call("POST", "/v1/completions", body, headers={"authorization": key}).status_code == 200
        assert guarded.call("GET", "/v1/models").status_code == 401
        assert guarded.call("GET", "/health").status_code == 200
    finally:
        guarded.close()


def test_tokens_and_back(api: Api) -> None:
    body = {"model": "demo", "prompt": "The sky is blue."}
    found = api.post("/tokenize", {**body, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] > 0
    plain = api.post("/tokenize", {**body, "add_special_tokens": False}).json()["tokens"]
    text = api.post("/detokenize", {"model": "demo", "tokens": plain}).json()["prompt"]
    assert text == body["prompt"]
    for bad in ({"tokens": [10**9]}, {"tokens": ["a"]}, {}):
        assert api.post("/detokenize", {"model": "demo", **bad}).status_code == 400


def rendered(api: Api, **fields) -> str:
    tokens = api.post("/tokenize", {"model": "demo", "messages": MESSAGES, **fields}).json()["tokens"]
    return api.post("/detokenize", {"model": "demo", "tokens": tokens}).json()["prompt"]


def test_templates(api: Api) -> None:
    prompt, bare = rendered(api), rendered(api, add_generation_prompt=False)
    assert prompt.startswith(bare) and len(prompt) > len(bare) and MESSAGES[0]["content"] in bare
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    assert rendered(api, messages=parts) == prompt
    begun = [*MESSAGES, {"role": "assistant", "content": "The capital"}]
    went_on = rendered(api, messages=begun, add_generation_prompt=False, continue_final_message=True)
    assert went_on.endswith("The capital")
    both = {"messages": begun, "add_generation_prompt": True, "continue_final_message": True}
    assert api.post("/v1/chat/completions", {"model": "demo", "max_tokens": 1, **both}).status_code == 400


def test_templates_of_requests_are_refused(api: Api) -> None:
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 1, "chat_template": "{{ messages[0].content }}"}
    response = api.post("/v1/chat/completions", body)
    assert response.status_code == 400 and "--chat-template" in response.json()["error"]["message"]


def test_an_answer_goes_on_where_it_was_begun(api: Api) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "The capital of France"}]
    fields = {"messages": begun, "add_generation_prompt": False, "continue_final_message": True, "temperature": 0}
    went_on = api.answer("/v1/chat/completions", **fields, max_tokens=12)["choices"][0]["message"]["content"]
    echoed = api.answer("/v1/chat/completions", **fields, max_tokens=12, echo=True)["choices"][0]["message"]["content"]
    assert "Paris" in went_on and echoed == "The capital of France" + went_on


def test_same_seed_same_text(api: Api) -> None:
    fields = {"prompt": "Once", "temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
    texts = [api.answer("/v1/completions", **fields, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
