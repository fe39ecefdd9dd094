"""Time per token in the API process: message decoded, detokenized, written as an event to its client.

    python -P benchmarks/streams.py MODEL_DIR [--streams 1,16,64,256] [--endpoint chat] [--profile]

The engine is a stub that sends messages of steps; the application is the real one, called without sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import logging
import pstats
import time
from array import array

import msgspec

from fuseline.api.app import build_app
from fuseline.api.config_resolve import resolve
from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineReady, EngineRequest, StepOutputs, TokenDeltas, TokenOutput
from fuseline.engine.process import answer_decoder

NUM_STEPS = 200


class StandIn(EngineClient):
    """An engine that steps on command: every choice of every request gets one token."""

    def __init__(self, config, vocab_size: int) -> None:
        super().__init__(config)
        self.is_alive = True
        self.vocab_size = vocab_size
        self.requests: list[EngineRequest] = []
        self._bytes = msgspec.msgpack.Encoder()
        self._decoder = answer_decoder()
        self._num_steps = 0

    def _send(self, message) -> None:
        if isinstance(message, EngineRequest):
            self.requests.append(message)

    def step(self, finish_reason: str | None = None) -> None:
        places = [(request, index) for request in self.requests for index in range(request.params.n)]
        tokens = [100 + (7 * handle + 13 * self._num_steps) % (self.vocab_size - 200) for handle in range(len(places))]
        outputs, deltas = [], TokenDeltas()
        if self._num_steps == 0 or finish_reason:
            outputs = [
                TokenOutput(
                    request_id=request.request_id, index=index, token_ids=(token,), handle=handle,
                    finish_reason=finish_reason,
                )
                for handle, ((request, index), token) in enumerate(zip(places, tokens, strict=True))
            ]  # fmt: skip
        else:
            deltas = TokenDeltas(array("q", range(len(places))).tobytes(), array("q", tokens).tobytes())
        self._num_steps += 1
        message = self._bytes.encode(StepOutputs(outputs=outputs, deltas=deltas))
        self._take(self._decoder.decode(message))


class Client:
    """An HTTP client of an ASGI application; counts the bytes sent to it."""

    def __init__(self, path: str, body: dict) -> None:
        self.scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("t", 80),
        }  # fmt: skip
        self.body = json.dumps(body).encode()
        self.num_writes = 0
        self.written: list[bytes] = []
        self._is_sent = False

    async def receive(self) -> dict:
        if self._is_sent:
            await asyncio.Event().wait()
        self._is_sent = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: dict) -> None:
        if message.get("body"):
            self.num_writes += 1
            self.written.append(message["body"])


async def settle(client_tasks) -> None:
    """Let the application do all that it can without news."""
    for _ in range(12):
        await asyncio.sleep(0)


def make_app(folder: str):
    config = resolve({"model": folder, "disable_log_requests": True})
    ready = EngineReady(
        vocab_size=40000, max_model_len=4096, num_blocks=1, block_size=16, dtype="f", kv_cache_dtype="f",
        eos_token_ids=(0,), architecture="StandIn",
    )  # fmt: skip
    client = StandIn(config.engine, 8000)
    return build_app(config, client, ready), client


async def measure(
    folder: str, num_streams: int, endpoint: str, profile: cProfile.Profile | None
) -> tuple[float, float]:
    """Microseconds of a token, writes of a step and client."""
    app, engine = make_app(folder)
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    prompt = chat if endpoint == "chat" else {"prompt": "hello"}
    path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    body = {**prompt, "stream": True, "max_tokens": 2000, "ignore_eos": True}
    clients = [Client(path, body) for _ in range(num_streams)]
    tasks = [asyncio.create_task(app(client.scope, client.receive, client.send)) for client in clients]
    while len(engine.requests) < num_streams:
        await asyncio.sleep(0.001)
    engine.step()
    await asyncio.sleep(0.05)
    before = sum(client.num_writes for client in clients)
    if profile:
        profile.enable()
    start = time.perf_counter()
    for _ in range(NUM_STEPS):
        engine.step()
        await settle(tasks)
    seconds = time.perf_counter() - start
    if profile:
        profile.disable()
    num_writes = sum(client.num_writes for client in clients) - before
    engine.step("length")
    await asyncio.gather(*tasks)
    return 1e6 * seconds / NUM_STEPS / num_streams, num_writes / NUM_STEPS / num_streams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--streams", default="1,16,64,256")
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    for num_streams in map(int, options.streams.split(",")):
        profile = cProfile.Profile() if options.profile else None
        micros, writes = asyncio.run(measure(options.model, num_streams, options.endpoint, profile))
        print(f"{num_streams:4d} streams: {micros:7.1f} us a token, {writes:.2f} writes a step and client", flush=True)
        if profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
