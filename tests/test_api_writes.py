"""One write for a client and a step of the engine, with any number of choices and prompts; comments while silent."""

from __future__ import annotations

import asyncio
import json
from array import array
from typing import Any

import pytest

from fuseline.api.app import build_app
from fuseline.api.config_resolve import resolve
from fuseline.api.output.outbox import KEEP_ALIVE, Outbox
from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineReady, EngineRequest, StepOutputs, TokenDeltas, TokenOutput

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class SteppedEngine(EngineClient):
    """Sends a step's outputs when told to: one token for every choice."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.is_alive = True
        self.requests: list[EngineRequest] = []
        self.messages: list[Any] = []
        self.num_steps = 0

    def _send(self, message) -> None:
        (self.requests if isinstance(message, EngineRequest) else self.messages).append(message)

    def step(self, finish_reason: str | None = None, error: str = "") -> None:
        places = [(request.request_id, index) for request in self.requests for index in range(request.params.n)]
        token = 40 + self.num_steps
        if self.num_steps and not finish_reason:
            handles, tokens = array("q", range(len(places))), array("q", [token] * len(places))
            self._take(StepOutputs(deltas=TokenDeltas(handles.tobytes(), tokens.tobytes())))
        else:
            self._take(StepOutputs(outputs=[
                TokenOutput(
                    request_id=id, index=index, token_ids=(token,), handle=handle,
                    finish_reason=finish_reason, error=error,
                )
                for handle, (id, index) in enumerate(places)
            ]))  # fmt: skip
        self.num_steps += 1


class Answer:
    """A request made of the application without sockets; `writes` are the pieces of the body."""

    def __init__(self, app, path: str, body: dict[str, Any]) -> None:
        self.writes: list[bytes] = []
        self._body = json.dumps({"stream": True, "ignore_eos": True, **body}).encode()
        self._gone = asyncio.Event()
        self._is_read = False
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("t", 80),
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict[str, Any]:
        if self._is_read:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        self._is_read = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: dict[str, Any]) -> None:
        if message.get("body"):
            self.writes.append(message["body"])


def open_app(**flags: Any):
    config = resolve({"model": "demo", "prompt_workers": 0, **flags})
    ready = EngineReady(
        vocab_size=5000, max_model_len=256, num_blocks=9, block_size=16, dtype="float32", kv_cache_dtype="float32",
        eos_token_ids=(0,), architecture="Stepped",
    )  # fmt: skip
    engine = SteppedEngine(config.engine)
    return build_app(config, engine, ready), engine


async def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never happened")


def events(write: bytes) -> list[dict[str, Any]]:
    lines = write.decode().split("\n\n")
    assert lines[-1] == "" and all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line[6:]) for line in lines[:-1] if line != "data: [DONE]"]


@pytest.mark.parametrize(
    "path, body, num_choices",
    [
        (COMPLETIONS, {"prompt": "a"}, 1),
        (COMPLETIONS, {"prompt": "a", "n": 3, "temperature": 1.0}, 3),
        (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2, "temperature": 1.0}, 6),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 3, "temperature": 1.0}, 3),
    ],
    ids=["one", "choices", "prompts", "chat"],
)
async def test_a_step_is_one_write(path: str, body: dict[str, Any], num_choices: int) -> None:
    app, engine = open_app()
    answer = Answer(app, path, body)
    await until(lambda: sum(request.params.n for request in engine.requests) == num_choices)
    for count in range(1, 6):
        engine.step()
        await until(lambda count=count: len(answer.writes) >= count)
        await asyncio.sleep(0.01)
        assert len(answer.writes) == count
    for write in answer.writes[1:]:
        assert sorted(choice["index"] for event in events(write) for choice in event["choices"]) == [
            *range(num_choices)
        ]
    engine.step("length")
    await answer.task
    ends = [choice for event in events(answer.writes[5]) for choice in event["choices"] if choice["finish_reason"]]
    assert len(ends) == num_choices
    # The end of several prompts is known a moment after the last of them.
    assert len(answer.writes) <= (7 if len(engine.requests) > 1 else 6)
    assert answer.writes[-1].endswith(b"data: [DONE]\n\n")


async def test_an_error_is_the_last_event() -> None:
    app, engine = open_app()
    answer = Answer(app, COMPLETIONS, {"prompt": "a"})
    await until(lambda: engine.requests)
    engine.step()
    await until(lambda: answer.writes)
    engine.step("error", "the model's output is not finite")
    await answer.task
    assert events(answer.writes[-1])[0]["error"]["message"] == "the model's output is not finite"
    assert answer.writes[-1].endswith(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_aborts_its_request() -> None:
    app, engine = open_app()
    answer = Answer(app, COMPLETIONS, {"prompt": "a", "n": 2, "temperature": 1.0})
    await until(lambda: engine.requests)
    engine.step()
    await until(lambda: answer.writes)
    answer.leave()
    await answer.task
    await until(lambda: engine.messages)
    assert engine.messages[0].request_ids == (engine.requests[0].request_id,) and engine.num_in_flight == 0


async def test_comments_while_silent() -> None:
    app, engine = open_app(sse_keep_alive_interval=0.05)
    answer = Answer(app, COMPLETIONS, {"prompt": "a"})
    await until(lambda: engine.requests)
    engine.step()
    await until(lambda: len(answer.writes) == 3)
    assert answer.writes[1:] == [KEEP_ALIVE] * 2
    engine.step("length")
    await answer.task
    assert answer.writes[-1].endswith(b"data: [DONE]\n\n")


async def test_no_comments_while_there_is_news() -> None:
    outbox = Outbox(0.06)
    taken = []
    for number in range(12):
        asyncio.get_running_loop().call_later(0.01, outbox.add, b"%d" % number)
        taken.append(await outbox.take())
    assert b"".join(taken) == b"01234567891011"
    assert await outbox.take() == KEEP_ALIVE
    outbox.close()
    assert await outbox.take() == b""


async def test_an_outbox_joins_what_has_gathered() -> None:
    outbox = Outbox(0)
    for part in (b"a", b"b", b"c"):
        outbox.add(part)
    assert await outbox.take() == b"abc"
    outbox.add(b"d")
    outbox.close()
    assert (await outbox.take(), await outbox.take()) == (b"d", b"")
