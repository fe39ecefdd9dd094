"""Traces that one answer, client or process must not leave for the next: headers, places, processes, time."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from api_writes_cases import CHAT, COMPLETIONS, Answer, open_app, until
from prompt_cases import SPINNING
from raw_http import Server, completion, headers, request, serving

from fuseline.api.config_resolve import resolve
from fuseline.api.server import bind
from fuseline.engine.client import EngineDeadError

CHATS = [("small", 0), ("large", 100_000)]


def chat(size: int = 0, **fields: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "unknown": "x" * size, **fields}
    return request("POST", CHAT, "Content-Type: application/json", body=json.dumps(body).encode())


async def test_the_headers_of_a_stream_are_its_own() -> None:
    async with serving(enable_request_id_headers=True) as server:
        for number in range(1, 5):
            async with server.client() as client:
                client.send(completion(f"X-Request-Id: mine-{number}", "Origin: http://o", stream=True))
                await until(lambda: server.engine.requests)
                server.engine.step()
                head = (await client.head()).decode().lower()
                assert head.count("x-request-id: ") == 1 and f"x-request-id: mine-{number}" in head
                names = [line.partition(":")[0] for line in head.split("\r\n")]
                assert len(set(names)) == len(names) - 1, head  # the empty line comes twice
                server.engine.step("length")
                await until(lambda: server.engine.num_in_flight == 0)
                server.engine.requests.clear()
                server.engine.num_steps = 0


@pytest.mark.parametrize("stream", [False, True])
async def test_the_death_of_the_engine_is_an_answer_and_no_fault_of_the_application(stream: bool) -> None:
    async with serving(enable_request_id_headers=True) as server:
        async with server.client() as client:
            client.send(completion("Origin: http://o", stream=stream))
            await until(lambda: server.engine.requests)
            server.engine._fail_all(EngineDeadError("killed"))
            head, body = await client.answer()
        sent = headers(head)
        assert b" 503 " in head and json.loads(body)["error"]["code"] == "engine_restarting"
        assert sent["access-control-allow-origin"] == "*" and sent["x-request-id"] and sent["retry-after"] == "5"
    app, engine = open_app()
    answer = Answer(app, COMPLETIONS, {"prompt": "a", "stream": stream})
    await until(lambda: engine.requests)
    engine._fail_all(EngineDeadError("killed"))
    await answer.task  # raises what the application lets through, which a server logs as its own fault


async def test_a_request_id_is_bounded() -> None:
    async with serving(enable_request_id_headers=True) as server, server.client() as client:
        client.send(completion("X-Request-Id: " + "i" * 257))
        head, body = await client.answer()
        assert b" 400 " in head and json.loads(body)["error"]["param"] == "X-Request-Id"


@pytest.fixture
async def spinning() -> AsyncIterator[Server]:
    flags = {"chat_template": SPINNING, "prompt_workers": 1, "prompt_timeout": 60.0}
    async with serving(**flags, max_num_seqs=2, max_num_queued_reqs=2) as server:
        yield server
        server.app.state.served.close()


@pytest.mark.parametrize("size", [size for _, size in CHATS], ids=[name for name, _ in CHATS])
async def test_a_client_that_leaves_while_its_request_is_prepared_frees_all_at_once(
    spinning: Server, size: int
) -> None:
    served = spinning.app.state.served
    pool = served.pools[size > 0]
    clients = [spinning.client() for _ in range(4)]
    for client in clients:
        await client.__aenter__()
        client.send(chat(size, chat_template_kwargs={"spin": True}))
    await until_slowly(lambda: served.admission.num_sequences == 4)
    async with spinning.client() as late:
        late.send(chat())
        assert b" 429 " in await late.head()
    begin = time.monotonic()
    for client in clients:
        no_linger = struct.pack("ii", 1, 0)  # closes with a reset
        client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        client.writer.transport.abort()
    processes = pool.processes
    await until_slowly(lambda: not (served.admission.num_sequences or processes.busy or served.bodies.num_bytes))
    assert time.monotonic() - begin < 2 and not spinning.engine.requests


async def test_a_client_that_only_closes_is_found_soon(spinning: Server) -> None:
    served = spinning.app.state.served
    async with spinning.client() as client:
        client.send(chat(chat_template_kwargs={"spin": True}))
        await until_slowly(lambda: served.admission.num_sequences == 1)
    begin = time.monotonic()
    await until_slowly(lambda: served.admission.num_sequences == 0)
    assert time.monotonic() - begin < 5


async def until_slowly(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_connections_do_not_wait_for_acknowledgements() -> None:
    """asyncio turns Nagle's algorithm off for sockets that name their protocol; with it, an answer waits 40 ms."""
    accepted: list[socket.socket] = []
    listener = bind(resolve({"model": "demo", "port": 0}))
    server = await asyncio.start_server(lambda _, out: accepted.append(out.get_extra_info("socket")), sock=listener)
    _, writer = await asyncio.open_connection(*listener.getsockname())
    await until(lambda: accepted)
    assert accepted[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
    server.close()
