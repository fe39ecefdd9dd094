"""From tokens to bytes: what the engine makes of all prompts of one request, written to its client.

    engine --TokenOutput--> Generation --Event--> Writer --chunk--> Outbox --bytes--> client

A task a prompt runs the first half, all of it plain calls; this response is the second. A whole answer folds the same
events into one object. Nothing is sent before the first event, so that a refusal keeps its status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fuseline.api.errors import ApiError, to_api_error
from fuseline.api.output.events import Event, Prompt, PromptInfo, TextDelta
from fuseline.api.output.generation import Generation
from fuseline.api.output.logprobs import encode_pieces
from fuseline.api.output.outbox import WRITE_BYTES, Outbox
from fuseline.api.output.pace import Turns
from fuseline.engine.client import EngineClient

LOG = logging.getLogger("fuseline.http")
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
PromptSink = Callable[[Prompt, Event], Awaitable[None] | None]
"""A Sink of Generation for several prompts."""
Run = tuple[Prompt, Callable[[], Generation]]
"""A prompt and what makes its way through the engine, called when its turn comes."""


class Writer(Protocol):
    """The shape of an API: chunks of a stream, or the fold of them."""

    async def open(self, prompt: Prompt, info: PromptInfo) -> None: ...

    def fold(self, prompt: Prompt, event: Event) -> None: ...

    def chunks(self, prompt: Prompt, event: Event) -> list[dict[str, Any]]: ...

    def is_long(self, prompt: Prompt, event: Event) -> bool: ...

    async def long_chunks(self, prompt: Prompt, event: TextDelta) -> list[dict[str, Any]]: ...

    def last_chunks(self) -> list[dict[str, Any]]: ...

    async def whole(self) -> list[bytes]: ...


class Answer(Response):
    """The answer to one request. `held` is left once it has been written, or its client has gone."""

    def __init__(
        self,
        client: EngineClient,
        runs: list[Run],
        writer: Writer,
        held: AbstractContextManager,
        keep_alive: float | None,
        turns: Turns,
    ) -> None:
        """`keep_alive`: seconds of silence before a comment in a stream (0: never); None answers whole."""
        super().__init__()
        self._client, self._runs, self._writer, self._held = client, runs, writer, held
        self._keep_alive, self._turns = keep_alive, turns
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            write = self._write_whole(scope, receive, send) if self._keep_alive is None else self._write_stream(send)
            if not await until_disconnect(receive, write) and not self._has_begun:
                raise ClientDisconnect()

    async def _write_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(self._writer.fold)
        self._has_begun = True
        await raw_response(await self._writer.whole())(scope, receive, send)

    async def _write_stream(self, send: Send) -> None:
        outbox = Outbox(self._keep_alive)
        filling = asyncio.ensure_future(self._fill(outbox))
        try:
            written = await outbox.take()
            self._has_begun = True
            # A new message for every stream: middleware adds the headers of this one to it.
            await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
            while written:
                await send({"type": "http.response.body", "body": written, "more_body": True})
                written = await outbox.take()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            outbox.close()
            await _end(filling)

    async def _fill(self, outbox: Outbox) -> None:
        """Every chunk as a server-sent event. An error is the last one, or refuses the request if it comes first."""

        def add(prompt: Prompt, event: Event) -> Awaitable[None] | None:
            if self._writer.is_long(prompt, event):
                return self._add_long(outbox, prompt, event)
            for chunk in self._writer.chunks(prompt, event):
                outbox.add(sse(chunk))
            return None

        try:
            await self._generate(add)
            for chunk in self._writer.last_chunks():
                outbox.add(sse(chunk))
        except Exception as error:
            if not outbox.has_begun:
                outbox.fail(error)
                return
            outbox.add(sse(_failure(error).body()))
        outbox.add(DONE)
        outbox.close()

    async def _add_long(self, outbox: Outbox, prompt: Prompt, event: TextDelta) -> None:
        for chunk in await self._writer.long_chunks(prompt, event):
            outbox.add(b"data: ", *encode_pieces(chunk), b"\n\n")

    async def _generate(self, sink: PromptSink) -> None:
        """Run all prompts; the first error ends all. One starts in each round of the event loop."""
        if len(self._runs) == 1:
            await self._run(self._runs[0], sink)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for run in self._runs:
                    group.create_task(self._run(run, sink))
                    await asyncio.sleep(0)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _run(self, run: Run, sink: PromptSink) -> None:
        prompt, make = run
        await self._turns.rest()
        await make().run(self._client, partial(sink, prompt), partial(self._writer.open, prompt))


async def until_disconnect(receive: Receive, work: Any) -> bool:
    """Whether `work` was done before the client went away, which cancels it. Raises what it raises."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        await _end(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _failure(error: Exception) -> ApiError:
    mapped = to_api_error(error)
    if mapped.code == "internal_error" and not isinstance(error, ApiError):
        LOG.exception("error in a stream", exc_info=error)
    return mapped


def sse(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def json_response(body: Any) -> Response:
    return raw_response([msgspec.json.encode(body)])


def raw_response(pieces: list[bytes]) -> Response:
    """A JSON body in pieces; a large one is written at the client's pace."""
    size = sum(map(len, pieces))
    if size <= WRITE_BYTES:
        return Response(b"".join(pieces), media_type="application/json")
    headers = {"Content-Length": str(size)}
    return StreamingResponse(_in_writes(pieces), media_type="application/json", headers=headers)


async def _in_writes(pieces: list[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in writes of WRITE_BYTES at most."""
    gathered, size = [], 0
    for piece in pieces:
        for at in range(0, len(piece), WRITE_BYTES):
            part = piece[at : at + WRITE_BYTES]
            if size + len(part) > WRITE_BYTES:
                yield b"".join(gathered)
                gathered, size = [], 0
            gathered.append(part)
            size += len(part)
    yield b"".join(gathered)
