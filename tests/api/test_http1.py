"""Connections as bytes: bounds of size and time, offered upgrades, half-closed clients, HTTP/1.0, HEAD, pipelining."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from typing import Any

import pytest
from api_writes_cases import until
from raw_http import Client, Server, completion, headers, request, serving

from fuseline.api.config_resolve import resolve
from fuseline.api.http1 import ConnectionLimits, connection_limits
from fuseline.api.route_table import route_table

UPGRADES = [
    ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"),
    ("Upgrade: h2c", "Connection: upgrade"),
    ("Connection: keep-alive, Upgrade", "Upgrade: foo/2, bar"),
    ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==", "Sec-WebSocket-Version: 13"),
    ("Connection: Upgrade", "Upgrade: TLS/1.0", "Upgrade: h2c"),
]
FLAGS = {
    "h11_max_incomplete_event_size": 5000, "h11_max_header_count": 9, "max_pipelined_requests": 7,
    "request_header_timeout": 1.0,
    "request_body_timeout": 2.0, "request_body_min_rate": 3, "keep_alive_timeout": 4.0, "response_write_timeout": 5.0,
}  # fmt: skip
TOKENIZE = b"POST /tokenize HTTP/1.1\r\nContent-Type: application/json\r\n"


async def echo(scope: dict, receive: Any, send: Any) -> None:
    """Answers with what it got."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    query = scope["query_string"].decode()
    got = {"method": scope["method"], "path": scope["path"], "query": query, "body": body.decode()}
    content = json.dumps(got).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]})
    await send({"type": "http.response.body", "body": content})


def test_flags_reach_the_connection() -> None:
    assert connection_limits(resolve(FLAGS)) == ConnectionLimits(5000, 9, 7, 1.0, 2.0, 3, 4.0, 5.0)
    assert connection_limits(resolve({})) == ConnectionLimits(65536, 256, 100, 10.0, 30.0, 4096, 5.0, 60.0)


async def error_of(client: Client) -> tuple[int, dict, dict]:
    """Status, headers and error object of a refusal, after which the server closes."""
    head, body = await client.answer()
    assert await client.rest() == b"" and headers(head)["connection"] == "close"
    return int(head.split()[1]), headers(head), json.loads(body)["error"]


@pytest.mark.parametrize("offer", UPGRADES, ids=lambda offer: offer[1])
@pytest.mark.parametrize("size", [0, 5, 300_000], ids=["empty", "small", "large"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("piece", [7, 10**9], ids=["in pieces", "at once"])
async def test_an_offered_upgrade_is_served_as_plain_http(
    offer: tuple[str, ...], size: int, is_chunked: bool, piece: int
) -> None:
    if piece == 7 and size > 5:
        piece = 7000
    body = b"x" * size
    plain = request("POST", "/p?q=1", *offer, body=body)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:3], body[3:]) if part) + b"0\r\n\r\n"
    raw = request("POST", "/p?q=1", *offer, "Transfer-Encoding: chunked") + chunks if is_chunked else plain
    async with serving(app=echo) as server, server.client() as client:
        for part in range(0, len(raw), piece):
            client.send(raw[part : part + piece])
            await asyncio.sleep(0)
        client.send(request("GET", "/next"))  # the connection goes on
        for method, path, content in (("POST", "/p", body.decode()), ("GET", "/next", "")):
            head, answer = await client.answer()
            assert head.startswith(b"HTTP/1.1 200")
            query = "q=1" if method == "POST" else ""
            assert json.loads(answer) == {"method": method, "path": path, "query": query, "body": content}


async def test_upgrades_with_expectations_and_of_get() -> None:
    async with serving(app=echo) as server, server.client() as client:
        client.send(request("POST", "/", *UPGRADES[0], "Expect: 100-continue", "Content-Length: 3"))
        assert (await client.head()).startswith(b"HTTP/1.1 100 ")
        client.send(b"abc", request("GET", "/g", *UPGRADES[3]), request("HEAD", "/h", *UPGRADES[1]))
        assert json.loads((await client.answer())[1])["body"] == "abc"
        assert json.loads((await client.answer())[1])["path"] == "/g"
        assert (await client.head()).startswith(b"HTTP/1.1 200")


async def test_a_java_client_gets_its_completion() -> None:
    async with serving() as server, server.client() as client:
        client.send(completion(*UPGRADES[0], max_tokens=1))
        await until(lambda: server.engine.requests)
        server.engine.step("length")
        head, body = await client.answer()
        assert head.startswith(b"HTTP/1.1 200") and json.loads(body)["usage"]["completion_tokens"] == 1


async def test_connect_and_garbage_are_refused() -> None:
    async with serving() as server:
        cases = [
            (b"CONNECT host:1 HTTP/1.1\r\nHost: h\r\n\r\n", 405), (b"\x16\x03\x01\x02\x00", 400), (b"GET\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
            (TOKENIZE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        ]  # fmt: skip
        for raw, expected in cases:
            async with server.client() as client:
                client.send(raw)
                status, _, error = await error_of(client)
                assert status == expected and error["type"] == "invalid_request_error", raw


@pytest.mark.parametrize(
    "lines",
    [
        ["X: " + "a" * 8_000_000], ["X: " + "a" * 9000], [f"X-{k}: 1" for k in range(10_000)],
        [f"X-{k}: 1" for k in range(21)], [f"{name}: " + "a" * 4000 for name in "XYZ"], ["a" * 20_000 + ": 1"],
    ],
    ids=["8 MB", "line", "10000", "21", "together", "name"],
)
@pytest.mark.parametrize("ends", [True, False], ids=["whole", "open"])
async def test_too_much_head_is_431(lines: list[str], ends: bool) -> None:
    if not ends and len(lines) == 3:
        lines = [*lines, "W: " + "d" * 9000]
    raw = request("GET", "/health", "X-Request-Id: mine", "Origin: http://here", *lines)
    async with serving(enable_request_id_headers=True) as server, server.client() as client:
        client.send(raw if ends else raw[:-4])
        status, sent, error = await error_of(client)
        assert status == 431 and "--h11-max-" in error["message"] and error["code"] == "request_headers_too_large"
        assert sent["x-request-id"] == "mine" and sent["access-control-allow-origin"] == "*"


async def test_a_long_address_is_431_and_as_much_as_allowed_is_served() -> None:
    async with serving() as server:
        async with server.client() as client:
            client.send(b"GET /", b"a" * 50_000)
            assert (await error_of(client))[0] == 431
        async with server.client() as client:
            client.send(request("GET", "/health", "X: " + "a" * 8000, *[f"X-{k}: 1" for k in range(17)]))
            assert (await client.head()).startswith(b"HTTP/1.1 200")


SLOW = {"header_seconds": 0.3, "body_seconds": 0.3, "body_rate": 1000, "idle_seconds": 0.3}


async def drip(client: Client, data: bytes, seconds: float) -> None:
    """A byte now and then, until the server closes."""
    for k in range(len(data)):
        client.send(data[k : k + 1])
        await asyncio.sleep(seconds)
        if client.reader.at_eof() or client.writer.is_closing():
            return


@pytest.mark.parametrize("is_dripping", [False, True], ids=["silent", "dripping"])
@pytest.mark.parametrize(
    "begun, flag",
    [
        (b"GET /", "header"), (b"GET /health HTTP/1.1\r\nHost: h\r\n", "header"), (b"GET / HTTP/1.1\r\nX: a", "header"),
        (TOKENIZE + b"Content-Length: 900\r\n\r\n{", "body"),
        (TOKENIZE + b"Transfer-Encoding: chunked\r\n\r\n40\r\n{", "body"),
    ],
)  # fmt: skip
async def test_slow_requests_are_408(begun: bytes, flag: str, is_dripping: bool) -> None:
    async with serving(SLOW, enable_request_id_headers=True) as server, server.client() as client:
        start = time.monotonic()
        client.send(begun)
        dripping = asyncio.ensure_future(drip(client, b"a" * 40 if is_dripping else b"", 0.05))
        status, sent, error = await error_of(client)
        dripping.cancel()
        assert status == 408 and f"--request-{flag}-timeout" in error["message"] and "x-request-id" in sent
        assert 0.25 < time.monotonic() - start < 3


@pytest.mark.parametrize("begun", [b"", b"\r\n\r\n"], ids=["silent", "blank lines"])
async def test_idle_connections_are_closed(begun: bytes) -> None:
    async with serving(SLOW) as server, server.client() as client:
        client.send(begun)
        assert await client.rest(3) == b""
    async with serving(SLOW) as server, server.client() as client:
        client.send(request("GET", "/health"))
        await client.head()
        dripping = asyncio.ensure_future(drip(client, b"\r\n" * 40, 0.05))
        start = time.monotonic()
        assert await client.rest(3) == b"" and time.monotonic() - start < 1.5
        dripping.cancel()


async def test_a_body_that_comes_steadily_may_take_long() -> None:
    body = b"x" * 1200
    async with serving(SLOW, app=echo) as server, server.client() as client:
        client.send(request("POST", "/", "Content-Length: 1200"))
        for part in range(0, 1200, 100):
            await asyncio.sleep(0.06)
            client.send(body[part : part + 100])
        assert json.loads((await client.answer())[1])["body"] == body.decode()


async def test_a_client_that_reads_nothing_is_dropped() -> None:
    ended = asyncio.Event()

    async def endless(scope: dict, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.ensure_future(until_gone(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        ended.set()

    async def until_gone(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving({"write_seconds": 0.3}, app=endless) as server, server.client() as client:
        client.send(request("GET", "/"))
        await client.head()
        client.writer.transport.pause_reading()
        await asyncio.wait_for(ended.wait(), 10)


async def half_close(server: Server, raw: bytes) -> Client:
    client = await server.client().__aenter__()
    client.send(raw)
    client.writer.write_eof()
    await until(lambda: server.engine.requests)
    await asyncio.sleep(0.1)
    return client


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_half_closed_client_gets_its_answer(stream: bool, version: str) -> None:
    async with serving() as server:
        client = await half_close(server, completion(stream=stream, max_tokens=3, version=version))
        for reason in (None, None, "length"):
            await asyncio.sleep(0.3)
            server.engine.step(reason)
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 200") and b'"finish_reason":"length"' in answer
        assert b"[DONE]" in answer if stream else b'"completion_tokens":3' in answer
        assert not server.engine.messages, "nothing was aborted"
        client.writer.close()


async def test_pipelined_requests_before_a_half_close_are_all_answered() -> None:
    async with serving() as server:
        client = await half_close(server, completion(max_tokens=1) + request("GET", "/version") * 3)
        server.engine.step("length")
        assert (await client.rest()).count(b"HTTP/1.1 200") == 4
        client.writer.close()


async def test_a_half_closed_client_that_waits_long_is_asked_in_http() -> None:
    async with serving() as server:
        client = await half_close(server, completion(max_tokens=1))
        assert (await client.head()).startswith(b"HTTP/1.1 100 ")
        server.engine.step("length")
        assert (await client.answer())[0].startswith(b"HTTP/1.1 200")
        client.writer.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("half_first", [False, True], ids=["at once", "after half"])
async def test_a_client_that_closes_aborts_its_request(stream: bool, half_first: bool) -> None:
    async with serving(sse_keep_alive_interval=0.1) as server:
        client = await server.client().__aenter__()
        client.send(completion(stream=stream, max_tokens=100))
        await until(lambda: server.engine.requests)
        if stream:
            server.engine.step()
            await client.head()
        if half_first:
            client.writer.write_eof()
            await asyncio.sleep(0.1)
        client.writer.close()
        for _ in range(60):
            if server.engine.messages:
                break
            await asyncio.sleep(0.1)
        assert server.engine.messages[0].request_ids == (server.engine.requests[0].request_id,)
        assert server.engine.num_in_flight == 0


async def test_a_reset_aborts_at_once() -> None:
    async with serving() as server, server.client() as client:
        client.send(completion(max_tokens=100))
        await until(lambda: server.engine.requests)
        peer = client.writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.writer.transport.abort()
        await until(lambda: server.engine.messages)


async def test_a_request_that_ends_early_is_400() -> None:
    async with serving() as server:
        for raw in (b"GET / HT", TOKENIZE + b"Content-Length: 9\r\n\r\n{"):
            async with server.client() as client:
                client.send(raw)
                client.writer.write_eof()
                assert (await client.rest()).startswith(b"HTTP/1.1 400")


async def test_http_1_0_gets_no_chunks() -> None:
    async with serving() as server:
        async with server.client() as client:
            client.send(completion("Connection: keep-alive", stream=True, max_tokens=2, version="1.0"))
            await until(lambda: server.engine.requests)
            server.engine.step()
            server.engine.step("length")
            sent = headers(await client.head())
            assert "transfer-encoding" not in sent and "content-length" not in sent and sent["connection"] == "close"
            body = await client.rest()
            assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
        async with server.client() as client:
            client.send(request("GET", "/version", version="1.0"))
            head, _ = await client.answer()
            assert headers(head)["connection"] == "close" and await client.rest() == b""
        async with server.client() as client:
            for _ in range(3):
                client.send(request("GET", "/version", "Connection: Keep-Alive", version="1.0"))
                assert headers((await client.answer())[0])["connection"] == "keep-alive"
        async with server.client() as client:
            client.send(request("POST", "/tokenize", "Expect: 100-continue", body=b"{}", version="1.0"))
            assert (await client.head()).startswith(b"HTTP/1.1 415")


async def test_head_is_get_without_a_body() -> None:
    async with serving() as server, server.client() as client:
        gets = [path for path, methods in route_table(server.app) if "GET" in methods and "{" not in path]
        assert len(gets) > 12
        for path in [*gets, "/v1/models/demo", "/v1/models/none", "/nothing", "/v1/completions"]:
            client.send(request("GET", path))
            wanted, body = await client.answer()
            client.send(request("HEAD", path))
            got = await client.head()
            differ = {"date", "content-length"} if path == "/metrics" or path == "/metrics/" else {"date"}
            assert got.split(b"\r\n")[0] == wanted.split(b"\r\n")[0], path
            assert headers(got).keys() == headers(wanted).keys(), path
            assert {k: v for k, v in headers(got).items() if k not in differ} == {
                k: v for k, v in headers(wanted).items() if k not in differ
            }


async def test_an_answer_given_before_the_body_has_come_arrives() -> None:
    body = b"x" * 3_000_000
    async with serving() as server, server.client() as client:
        client.send(request("POST", "/nothing", "Connection: close", body=body))
        head, answer = await client.answer()
        assert head.startswith(b"HTTP/1.1 404") and json.loads(answer)["error"]["code"] == "not_found"
    async with serving() as server, server.client() as client:
        client.send(request("POST", "/nothing", "Expect: 100-continue", "Content-Length: 100"))
        head, _ = await client.answer()
        assert headers(head)["connection"] == "close", "whether the body comes is the client's choice"
        assert await client.rest() == b""


async def test_too_many_pipelined_requests_are_429_after_the_answers() -> None:
    async with serving() as server, server.client() as client:
        client.send(completion(max_tokens=1), request("GET", "/version") * 400)
        await until(lambda: server.engine.requests)
        server.engine.step("length")
        answer = await client.rest()
        assert answer.count(b"HTTP/1.1 200") == 101 and answer.count(b"HTTP/1.1 429") == 1
