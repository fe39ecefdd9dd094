"""From tokens to bytes: what the engine makes of all prompts of one request, written to its client.

    engine --TokenOutput--> Generation --Event--> Writer --chunk--> Outbox --bytes--> client

A task a prompt runs the first half, all of it plain calls; this response is the second. A whole answer folds the same
events into one object. Nothing is sent before the first event, so that a refusal keeps its status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fuseline.api.errors import ApiError, to_api_error
from fuseline.api.output.beam import BeamSearch
from fuseline.api.output.events import Event, Prompt, PromptInfo
from fuseline.api.output.framing import OPENAI, Framing
from fuseline.api.output.generation import Generation
from fuseline.api.output.logprobs import encode_pieces
from fuseline.api.output.outbox import WRITE_BYTES, Outbox
from fuseline.api.output.pace import LARGE, Turns
from fuseline.engine.client import EngineClient

LOG = logging.getLogger("fuseline.http")
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
PromptSink = Callable[[Prompt, Sequence[Event]], Awaitable[None] | None]
"""A Sink of Generation for several prompts."""
Run = tuple[Prompt, Callable[[], Generation | BeamSearch]]
"""A prompt and what makes its way through the engine, called when its turn comes."""


class Writer(Protocol):
    """The shape of an API: chunks of a stream, or the fold of them."""

    async def open(self, prompt: Prompt, info: PromptInfo) -> None: ...

    def fold(self, prompt: Prompt, events: Sequence[Event]) -> None: ...

    def chunks(self, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Chunks of the events of one output. A choice's end goes with the last of its text."""

    def last_chunks(self) -> list[dict[str, Any]]: ...

    async def whole(self) -> list[bytes]: ...


@runtime_checkable
class SlicedWriter(Writer, Protocol):
    """A writer of OpenAI's chunks that can make long ones in slices."""

    def is_long(self, prompt: Prompt, events: Sequence[Event]) -> bool: ...

    async def long_chunks(self, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]: ...


class Answer(Response):
    """The answer to one request. `held` is left once it has been written, or its client has gone."""

    def __init__(
        self,
        client: EngineClient,
        runs: list[Run],
        writer: Writer,
        held: AbstractContextManager,
        keep_alive: float | None,
        is_one_event: bool = False,
        framing: Framing = OPENAI,
        *,
        turns: Turns,
    ) -> None:
        """`keep_alive`: seconds of silence before a comment in a stream (0: never); None answers whole. A stream of
        `is_one_event` is the whole answer as its one event.
        """
        super().__init__()
        self._is_one_event, self._framing = is_one_event, framing
        self._client, self._runs, self._writer, self._held = client, runs, writer, held
        self._sliced = writer if isinstance(writer, SlicedWriter) else None
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

        write = self._framing.write

        def add(prompt: Prompt, events: Sequence[Event]) -> Awaitable[None] | None:
            if self._sliced is not None and self._sliced.is_long(prompt, events):
                return self._add_long(outbox, self._sliced.long_chunks(prompt, events))
            for chunk in self._writer.chunks(prompt, events):
                outbox.add(write(chunk))
            return None

        try:
            if self._is_one_event:
                await self._generate(self._writer.fold)
                outbox.add(b"data: ", *await self._writer.whole(), b"\n\n")
            else:
                await self._generate(add)
                for chunk in self._writer.last_chunks():
                    outbox.add(write(chunk))
        except Exception as error:
            if not outbox.has_begun:
                outbox.fail(error)
                return
            outbox.add(write(self._framing.failure(_failure(error))))
        outbox.add(self._framing.end)
        outbox.close()

    async def _add_long(self, outbox: Outbox, chunks: Awaitable[list[dict[str, Any]]]) -> None:
        for chunk in await chunks:
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
        await self._turns.rest(LARGE if len(self._runs) > 1 else prompt.ids.itemsize * len(prompt.ids))
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
