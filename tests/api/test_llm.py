"""The offline `LLM` over a small fake app: batching, outputs, streaming, aborts, errors, closing."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fuseline.api.llm import LLM
from fuseline.api.llm_asgi import RequestFailed

USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


class FakeApp:
    """Answers with the prompt in capitals; "bad" is refused, "die" dies, "slow" never ends."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = self.num_aborted = self.num_stops = 0

    async def __call__(self, scope: dict, receive, send) -> None:
        assert (scope["type"], scope["method"]) == ("http", "POST")
        body = json.loads((await receive())["body"])
        self.bodies.append(body)
        text = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0.001)
            await self._answer(body, text, receive, send)
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        finally:
            self.in_flight -= 1

    async def _answer(self, body: dict, text: str, receive, send) -> None:
        if text == "die":
            raise RuntimeError("engine fell over")
        await send({"type": "http.response.start", "status": 400 if text == "bad" else 200, "headers": []})
        if text == "bad":
            await send({"type": "http.response.body", "body": b'{"error": {"message": "no such thing"}}'})
        elif body.get("stream"):
            await self._stream(text, send)
        else:
            if text == "slow":
                await receive()
            await send({"type": "http.response.body", "body": json.dumps(self._whole(body, text)).encode()})

    def _whole(self, body: dict, text: str) -> dict:
        part = {"message": {"content": text.upper()}} if "messages" in body else {"text": text.upper()}
        choices = [{"index": i, **part, "finish_reason": "stop", "token_ids": [7, 8]} for i in range(body.get("n", 1))]
        for choice in choices:
            choice |= {"prompt_token_ids": [1, 2], "logprobs": {"token_logprobs": [None, -9.0, -1.0, -2.0]}}
        return {"choices": choices, "usage": USAGE}

    async def _stream(self, text: str, send) -> None:
        while True:
            for piece in text:
                data = f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n".encode()
                for part in (data[:9], data[9:]):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.sleep(0)
            if text != "slow":
                break
        if text == "late":
            data = b'data: {"error": {"message": "too late"}}\n\n'
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b": ping\n\ndata: [DONE]\n\n", "more_body": False})


@pytest.fixture
def app(monkeypatch) -> FakeApp:
    fake = FakeApp()

    async def stop() -> None:
        fake.num_stops += 1

    async def start(config, progress):
        return fake, stop, None

    monkeypatch.setattr("fuseline.api.llm.start_app", start)
    return fake


@pytest.fixture
def llm(app: FakeApp, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with LLM(str(tmp_path), max_num_seqs=3, served_model_name="m", show_progress=False) as made:
        yield made


def test_generate_keeps_order_and_bounds_the_batch(llm: LLM, app: FakeApp) -> None:
    prompts = [f"prompt {index}" for index in range(20)]
    outputs = llm.generate(prompts, {"max_tokens": 3, "temperature": 0})
    assert [output.outputs[0].text for output in outputs] == [prompt.upper() for prompt in prompts]
    assert [output.prompt for output in outputs] == prompts
    assert 1 < app.most_in_flight <= 3
    assert app.bodies[0] == {
        "model": "m", "return_token_ids": True, "max_tokens": 3, "temperature": 0, "prompt": "prompt 0",
    }  # fmt: skip


def test_outputs(llm: LLM) -> None:
    output = llm.generate("one", {"n": 2})[0]
    assert [choice.index for choice in output.outputs] == [0, 1]
    assert output.outputs[1].token_ids == (7, 8) and output.prompt_token_ids == (1, 2)
    assert output.usage == USAGE and output.outputs[0].finish_reason == "stop"


def test_token_id_prompts(llm: LLM, app: FakeApp) -> None:
    assert len(llm.generate([1, 2, 3])) == 1
    assert len(llm.generate([[1, 2], (3,)])) == 2
    assert [body["prompt"] for body in app.bodies] == [[1, 2, 3], [1, 2], [3]]
    assert llm.generate([]) == []


def test_prompts_come_in_any_shape(llm: LLM, app: FakeApp) -> None:
    prompts = [np.array([1, 2]), [np.int64(3)], {"prompt_token_ids": np.array([4])}, {"prompt": "text"},
               {"prompt": "text", "prompt_token_ids": [5], "cache_salt": "s"}, torch.tensor([6])]  # fmt: skip
    outputs = llm.generate(prompts)
    sent = [body["prompt"] for body in app.bodies]
    assert sent == [output.prompt for output in outputs] == [[1, 2], [3], [4], "text", [5], [6]]
    assert [body.get("cache_salt") for body in app.bodies] == [None] * 4 + ["s", None]
    assert [len(llm.generate(one)) for one in ({"prompt": "one"}, np.array([1, 2]), torch.tensor([1, 2]))] == [1] * 3
    assert len(llm.generate(np.array([[1, 2], [3, 4]]))) == 2
    for bad, words in (({"promt": "x"}, "'promt'"), ({"multi_modal_data": {}, "prompt": "x"}, "multi_modal_data"),
                       ({}, "needs prompt"), ([1, 2.5], "whole numbers"), (np.array([[[1]]]), "one dimension"),
                       ({"prompt_token_ids": [[1]]}, "one dimension")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            llm.generate(bad)


def test_beams_are_asked_for(llm: LLM, app: FakeApp) -> None:
    params = SimpleNamespace(beam_width=2, max_tokens=4, length_penalty=0.5)
    for output in llm.beam_search(["a", "b"], params):
        assert [sequence.tokens for sequence in output.sequences] == [(1, 2, 7)] * 2, "an EOS is left out"
        assert [sequence.cum_logprob for sequence in output.sequences] == [-3.0] * 2
    kept = llm.beam_search("a", {"beam_width": 2, "max_tokens": 4, "include_stop_str_in_output": True})
    assert kept[0].sequences[1].tokens == (1, 2, 7, 8)
    wanted = {"use_beam_search": True, "n": 2, "max_tokens": 4, "length_penalty": 0.5, "temperature": 0.0}
    assert all(wanted.items() <= body.items() and "beam_width" not in body for body in app.bodies[:2])
    for bad in ({}, {"beam_width": 2}, {"max_tokens": 4}, {"beam_width": 2, "max_tokens": 4, "top_p": 0.5}):
        with pytest.raises(ValueError, match="beam search"):
            llm.beam_search("a", bad)


def test_batches_keep_refusals_as_answers(llm: LLM, app: FakeApp) -> None:
    answers = llm.run_batch([("/v1/completions", {"prompt": text}) for text in ("one", "bad", "two", "three")])
    assert [status for status, _ in answers] == [200, 400, 200, 200]
    assert answers[1][1] == {"error": {"message": "no such thing"}} and answers[2][1]["choices"][0]["text"] == "TWO"
    assert app.most_in_flight <= 3


@dataclass
class Params:
    temperature: float = 0.5
    top_p: float | None = None


def test_sampling_settings_come_in_any_shape(llm: LLM, app: FakeApp) -> None:
    llm.generate("x", Params())
    llm.generate("x", SimpleNamespace(temperature=0.5, _private=1))
    for body in app.bodies:
        assert body["temperature"] == 0.5 and set(body) == {"model", "return_token_ids", "temperature", "prompt"}
    llm.generate(["a", "b"], [{"seed": 1}, {"seed": 2}])
    assert sorted((body["prompt"], body["seed"]) for body in app.bodies[2:]) == [("a", 1), ("b", 2)]
    with pytest.raises(ValueError, match="one for each"):
        llm.generate(["a", "b"], [{}])


def test_chat_and_batches_of_chats(llm: LLM) -> None:
    one = [{"role": "user", "content": "hi"}]
    assert llm.chat(one)[0].outputs[0].text == "HI"
    other = [{"role": "user", "content": "ho"}]
    assert [output.outputs[0].text for output in llm.chat([one, other])] == ["HI", "HO"]


def test_stream_chat(llm: LLM, app: FakeApp) -> None:
    assert list(llm.stream_chat([{"role": "user", "content": "hello"}], {"max_tokens": 5})) == list("hello")
    assert app.bodies[-1]["stream"] and app.bodies[-1]["max_tokens"] == 5


def test_leaving_a_stream_aborts_it(llm: LLM, app: FakeApp) -> None:
    stream = llm.stream_chat([{"role": "user", "content": "slow"}])
    assert next(stream) == "s"
    stream.close()
    deadline = time.monotonic() + 10
    while app.in_flight and time.monotonic() < deadline:
        time.sleep(0.005)
    assert (app.in_flight, app.num_aborted) == (0, 1)


def test_errors_carry_the_servers_words(llm: LLM, app: FakeApp) -> None:
    with pytest.raises(RequestFailed, match="no such thing") as error:
        llm.generate("bad")
    assert error.value.status == 400
    with pytest.raises(RuntimeError, match="fell over"):
        llm.generate("die")
    with pytest.raises(ValueError, match="too late"):
        list(llm.stream_chat([{"role": "user", "content": "late"}]))
    with pytest.raises(ValueError, match="no such thing"):
        list(llm.stream_chat([{"role": "user", "content": "bad"}]))
    assert llm.generate("fine")[0].outputs[0].text == "FINE"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate(None), "prompts: must be a list of texts, token ids or mappings, not NoneType"),
        (lambda llm: llm.generate(b"text"), "prompts: must be a list .* not bytes"),
        (lambda llm: llm.generate(7), "prompts: .* not int"),
        (lambda llm: llm.generate([None]), "a prompt: must be a list of token ids, not NoneType"),
        (lambda llm: llm.generate([1.5]), "a prompt: .* not float"),
        (lambda llm: llm.generate([b"text"]), "a prompt: .* not bytes"),
        (lambda llm: llm.generate("a", {"stream": True}), "stream: answers come whole"),
        (lambda llm: llm.generate("a", [{"stream": True}]), "stream: answers come whole"),
        (lambda llm: llm.generate("a", "greedy"), "sampling settings must be .* not str"),
        (lambda llm: llm.generate("a", 3), "sampling settings must be .* not int"),
        (lambda llm: llm.chat(None), "messages: must be a list of messages, not NoneType"),
        (lambda llm: llm.chat("Hi"), "messages: .* not str"),
        (lambda llm: llm.chat(["Hi"]), "messages: .* not str"),
        (lambda llm: llm.chat([{"role": "user", "content": "a"}], {"stream": True}), "stream: answers come whole"),
        (lambda llm: llm.beam_search("a", {"beam_width": 0, "max_tokens": 1}), "beam_width must be .* not 0"),
        (lambda llm: llm.beam_search("a", {"beam_width": 1.5, "max_tokens": 1}), "beam_width must be"),
        (lambda llm: llm.encode(None), "prompts: "),
    ],
)
def test_values_of_wrong_kinds_are_named(llm: LLM, app: FakeApp, call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(llm)
    assert not app.bodies


def test_a_stream_in_a_batch_is_refused_alone(llm: LLM) -> None:
    path, chat = "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}
    (streamed, error), (status, _) = llm.run_batch([(path, {**chat, "stream": True}), (path, chat)])
    assert (streamed, status) == (400, 200) and error["error"]["message"].startswith("stream: ")


def test_prompts_of_a_generator(llm: LLM) -> None:
    assert [output.outputs[0].text for output in llm.generate(text for text in ("a", "b"))] == ["A", "B"]


def test_one_bad_prompt_ends_the_others(llm: LLM, app: FakeApp) -> None:
    with pytest.raises(ValueError, match="no such thing"):
        llm.generate(["slow", "bad"])
    assert (app.in_flight, app.num_aborted) == (0, 1)


def test_close_stops_once(app: FakeApp, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    llm = LLM(str(tmp_path), show_progress=False)
    llm.close()
    llm.close()
    assert app.num_stops == 1


def test_a_closed_one_says_so(app: FakeApp, llm: LLM) -> None:
    llm.close()
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate("a")


def test_failed_start_leaves_no_thread(monkeypatch, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")

    async def start(config, progress):
        raise RuntimeError("no weights")

    monkeypatch.setattr("fuseline.api.llm.start_app", start)
    with pytest.raises(RuntimeError, match="no weights"):
        LLM(str(tmp_path), show_progress=False)
    assert "fuseline-llm" not in [thread.name for thread in __import__("threading").enumerate()]
