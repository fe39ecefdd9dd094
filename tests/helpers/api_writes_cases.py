"""An API app over an engine that tests step by hand, and the events it streams."""

from __future__ import annotations

import asyncio
import json
from array import array
from typing import Any

from fuseline.api.app import build_app
from fuseline.api.config_resolve import resolve
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
