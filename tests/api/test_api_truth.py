"""Log-probabilities, beams and processors of answers, against Transformers on the same files."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from api_client import Api
from transformers import AutoModelForCausalLM, PreTrainedModel

from fuseline.api.config import demo_dir

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "The sky is blue because the sky is high, and the grass is green because the sky is blue. What is"
SALTED = "A prompt of its own for salts, which is longer than one block of sixteen tokens, and says little"


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    opened = Api(
        dtype="float32", max_logprobs=-1, enable_prompt_tokens_details=True, logits_processor_pattern=r"torch\.nn\."
    )
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo_dir(), dtype=torch.float32).eval()


@torch.inference_mode()
def scores(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] of what follows each token."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


def encoded(api: Api, text: str) -> list[int]:
    return api.post("/tokenize", {"model": "demo", "prompt": text}).json()["tokens"]


def close(found: list[float], expected: torch.Tensor) -> bool:
    return found == pytest.approx(expected.tolist(), abs=2e-3)


def test_prompt_logprobs_also_of_a_cached_prefix(api: Api, model: PreTrainedModel) -> None:
    ids = encoded(api, TEXT)
    assert len(ids) > 16
    api.answer(COMPLETIONS, prompt=ids, max_tokens=1)
    for top in (0, 3):
        choice = api.answer(COMPLETIONS, prompt=ids, max_tokens=1, prompt_logprobs=top)["choices"][0]
        found, truth = choice["prompt_logprobs"], scores(model, ids)
        assert found[0] is None and len(found) == len(ids)
        for position, entries in enumerate(found[1:]):
            own, best = ids[position + 1], truth[position].topk(top).indices.tolist()
            expected = list(dict.fromkeys([own, *best]))
            assert set(entries) == set(map(str, expected)) and next(iter(entries)) == str(own)
            for token, entry in entries.items():
                assert entry["logprob"] == pytest.approx(float(truth[position][int(token)]), abs=2e-3)
                assert entry["rank"] == int((truth[position] > truth[position][int(token)]).sum()) + 1


def test_logprobs_of_a_sampled_answer_with_a_cached_prefix(api: Api, model: PreTrainedModel) -> None:
    ids = encoded(api, TEXT)
    fields = {"prompt": ids, "max_tokens": 8, "temperature": 1.5, "seed": 5, "ignore_eos": True}
    fields["return_token_ids"] = True
    answers = [api.answer(COMPLETIONS, **fields, logprobs=2) for _ in range(2)]
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    assert answers[0]["choices"] == answers[1]["choices"]
    choice = answers[1]["choices"][0]
    truth = scores(model, ids + choice["token_ids"])[len(ids) - 1 : -1]
    assert close(choice["logprobs"]["token_logprobs"], truth[range(8), choice["token_ids"]])
    for row, token, top in zip(truth, choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
        assert next(iter(top)) == token and len(top) in (2, 3)
        assert close(sorted(top.values(), reverse=True)[:2], row.topk(2).values)


def test_chat_shows_the_token_itself_first_and_as_many_as_asked(api: Api) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 2.0, "logprobs": True}
    choice = api.answer(CHAT, **fields, seed=1, ignore_eos=True, top_logprobs=3)["choices"][0]
    ranked = 0
    for entry in choice["logprobs"]["content"]:
        first, *others = entry["top_logprobs"]
        assert first == {name: entry[name] for name in ("token", "logprob", "bytes")} and len(others) == 2
        assert [other["logprob"] for other in others] == sorted((o["logprob"] for o in others), reverse=True)
        ranked += others[0]["logprob"] > first["logprob"]
    assert ranked, "a token that is not the likeliest is among them"
    assert all(e["top_logprobs"] == [] for e in api.answer(CHAT, **fields)["choices"][0]["logprobs"]["content"])


def test_all_of_the_vocabulary(api: Api, model: PreTrainedModel) -> None:
    ids = encoded(api, "The sky")
    fields = {"max_tokens": 1, "logprobs": -1, "return_tokens_as_token_ids": True}
    (top,) = api.answer(COMPLETIONS, prompt=ids, **fields)["choices"][0]["logprobs"]["top_logprobs"]
    truth = scores(model, ids)[-1]
    assert len(top) == len(truth) and sum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-3)
    assert close([top[f"token_id:{token}"] for token in range(len(truth))], truth)


def test_named_tokens(api: Api, model: PreTrainedModel) -> None:
    ids, wanted = encoded(api, "The sky"), [7, 1500, 12]
    fields = {"max_tokens": 1, "temperature": 0, "logprob_token_ids": wanted, "return_tokens_as_token_ids": True}
    (top,) = api.answer(COMPLETIONS, prompt=ids, logprobs=0, **fields)["choices"][0]["logprobs"]["top_logprobs"]
    truth = scores(model, ids)[-1]
    assert list(top) == [f"token_id:{token}" for token in (int(truth.argmax()), *wanted)]
    assert close(list(top.values())[1:], truth[wanted])


def beams(model: PreTrainedModel, ids: list[int], width: int, steps: int, eos: int) -> list[list[int]]:
    """Generated tokens of the best hypotheses, an EOS left out, best first."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for _ in range(steps):
        found = []
        for total, tokens in live:
            best = scores(model, ids + tokens)[-1].topk(2 * width)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if token == eos:
                    done.append((total + value, tokens))
                else:
                    found.append((total + value, [*tokens, token]))
        live = heapq.nlargest(width, found)
    return [t for _, t in heapq.nlargest(width, done + live, key=lambda beam: beam[0] / (len(ids) + len(beam[1])))]


def test_beams(api: Api, model: PreTrainedModel) -> None:
    ids = encoded(api, "What is the")
    expected = beams(model, ids, 3, 6, model.generation_config.eos_token_id)
    fields = {"prompt": ids, "use_beam_search": True, "n": 3, "max_tokens": 6, "temperature": 0}
    choices = api.answer(COMPLETIONS, **fields, return_token_ids=True)["choices"]
    assert [choice["token_ids"] for choice in choices] == expected and [c["index"] for c in choices] == [0, 1, 2]
    (event,) = api.stream(COMPLETIONS, **fields)
    assert [choice["text"] for choice in event["choices"]] == [choice["text"] for choice in choices]
    (offline,) = api._llm.beam_search(ids, {"beam_width": 3, "max_tokens": 6})
    assert [list(sequence.tokens) for sequence in offline.sequences] == [ids + tokens for tokens in expected]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "use_beam_search": True, "n": 2, "max_tokens": 5}
    texts = [choice["message"]["content"] for choice in api.answer(CHAT, **chat)["choices"]]
    streamed = ["", ""]
    for choice in (choice for chunk in api.stream(CHAT, **chat) for choice in chunk["choices"]):
        streamed[choice["index"]] += choice["delta"]["content"]
    assert streamed == texts and texts[0] != texts[1]


def test_best_of_is_the_likeliest(api: Api) -> None:
    fields = {"prompt": "Once", "max_tokens": 6, "temperature": 1.5, "seed": 8, "ignore_eos": True, "logprobs": 0}
    every = api.answer(COMPLETIONS, **fields, n=5)["choices"]
    ranked = sorted(every, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    answer = api.answer(COMPLETIONS, **fields, n=2, best_of=5)
    assert [choice["text"] for choice in answer["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert answer["usage"]["completion_tokens"] == 12
    (event,) = api.stream(COMPLETIONS, **fields, n=2, best_of=5)
    assert event["choices"] == answer["choices"] and event["usage"] == answer["usage"]
    without = api.answer(COMPLETIONS, **{**fields, "logprobs": None}, n=2, best_of=5)["choices"]
    assert [c["text"] for c in without] == [c["text"] for c in answer["choices"]] and without[0]["logprobs"] is None


def test_a_salt_is_a_cache_of_its_own(api: Api) -> None:
    def num_cached(path: str, **fields: Any) -> int:
        prompt = {"prompt": SALTED} if path == COMPLETIONS else {"messages": [{"role": "user", "content": SALTED}]}
        return api.answer(path, **prompt, **fields, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]

    for path in (COMPLETIONS, CHAT):
        for fields in ({}, {"n": 2}):
            assert num_cached(path, cache_salt=f"a{fields}", **fields) == 0
            assert num_cached(path, cache_salt=f"a{fields}", **fields) >= 16
            assert num_cached(path, cache_salt=f"b{fields}", **fields) == 0
    assert num_cached(COMPLETIONS) == 0 and num_cached(COMPLETIONS) >= 16


def test_a_processor_by_its_name(api: Api) -> None:
    """torch.nn.Threshold is no processor (it takes one argument): its failure is its request's."""
    spec = {"qualname": "torch.nn.Threshold", "args": [0.0, -100.0]}
    response = api.post(COMPLETIONS, {"model": "demo", "prompt": "Hi", "max_tokens": 2, "logits_processors": [spec]})
    assert response.status_code == 400 and "logits processor" in response.json()["error"]["message"]
    assert api.answer(COMPLETIONS, prompt="Hi", max_tokens=1)["choices"]
