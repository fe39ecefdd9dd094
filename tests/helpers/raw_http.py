"""The application behind its own HTTP connections on a free port, and clients that write bytes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import uvicorn
from api_writes_cases import SteppedEngine, open_app

from fuseline.api.http1 import Connection, ConnectionLimits

LIMITS = ConnectionLimits(
    header_bytes=8192,
    num_headers=20,
    num_pipelined=100,
    header_seconds=5,
    body_seconds=5,
    body_rate=4096,
    idle_seconds=5,
    write_seconds=5,
)  # fmt: skip


class Client:
    """One TCP connection to the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def rest(self, seconds: float = 10) -> bytes:
        """All that comes until the server closes."""
        return await asyncio.wait_for(self.reader.read(), seconds)

    async def head(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)

    async def answer(self) -> tuple[bytes, bytes]:
        """Head and body of an answer with a content-length."""
        head = await self.head()
        return head, await self.reader.readexactly(int(headers(head)["content-length"]))


class Server:
    def __init__(self, port: int, engine: SteppedEngine, app: Any) -> None:
        self.port, self.engine, self.app = port, engine, app

    def client(self) -> Client:
        return Client(self.port)


@asynccontextmanager
async def serving(limits: dict[str, Any] | None = None, app: Any = None, **flags: Any) -> AsyncIterator[Server]:
    """`app` stands in for the real application, which has a stepped engine."""
    made, engine = open_app(**flags)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    bound = partial(Connection, replace(LIMITS, **(limits or {})))
    config = uvicorn.Config(app or made, http=bound, ws="none", lifespan="off", log_level="warning")
    config.load()
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield Server(listener.getsockname()[1], engine, made)
    finally:
        server.should_exit = server.force_exit = True
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await task
        listener.close()


def headers(head: bytes) -> dict[str, str]:
    lines = head.decode().split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def request(method: str, path: str, *lines: str, body: bytes = b"", version: str = "1.1") -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: h", *lines, *length, "", ""]).encode() + body


def completion(*lines: str, version: str = "1.1", **fields: Any) -> bytes:
    body = json.dumps({"prompt": "a", "ignore_eos": True, **fields}).encode()
    return request("POST", "/v1/completions", "Content-Type: application/json", *lines, body=body, version=version)
