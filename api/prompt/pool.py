"""Worker processes that prepare requests: started when needed, ended when a request takes too long, started anew."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import socket
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from fuseline.api.errors import ApiError
from fuseline.api.prompt.prepared import Reply, Written
from fuseline.api.prompt.worker import GOES_ON, frame, run_worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fuseline.api.prompt.prepare import Kind, PromptSettings

LOG = logging.getLogger("fuseline.prompts")
READ_BYTES = 256 * 1024
START_SECONDS = 60
"""Within which a process must have loaded the tokenizer."""


class PromptPool:
    """At most `size` processes, each with one request at a time; requests wait their turn in order.

    One more process than is busy is kept ready, up to `size`, so that a request that takes long delays no other.
    All methods belong to one event loop but `start`.
    """

    def __init__(self, settings: PromptSettings, size: int, niceness: int = 0) -> None:
        """`niceness`: how far the processes stand behind the engine where both want the same core."""
        self._settings = settings
        self._size = size
        self._niceness = niceness
        self._timeout = settings.config.prompt_timeout
        self._places = asyncio.Semaphore(size)
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()

    def start(self) -> None:
        """Start a process before the first request."""
        self._idle.append(_Worker(self._settings, self._niceness))

    def close(self) -> None:
        """End the idle processes; busy ones end with their requests."""
        while self._idle:
            self._idle.pop().kill()
        self._size = 0

    async def prepare(self, kind: Kind, pieces: Sequence[bytes]) -> Reply:
        """Raises ApiError 400 for a request that takes too long, 503 where no process is free in time or one ends."""
        async with self._worker() as worker:
            try:
                await worker.wait_ready()
                async with asyncio.timeout(self._timeout):
                    return await worker.prepare(kind, pieces)
            except TimeoutError as error:
                message = f"reading, rendering and encoding the request takes more than {self._timeout:g} seconds"
                raise ApiError(400, f"{message} (--prompt-timeout)", code="request_too_slow") from error
            except (EOFError, OSError) as error:
                LOG.error("a process that prepares requests ended while it worked on one (%s)", kind)
                message = "the process that read, rendered and encoded the request ended; the request may be too large"
                raise ApiError(503, message, code="prompt_worker_ended") from error

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Worker]:
        """A process for one request. One that has not come to the end of its reply is killed."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._places.acquire()
        except TimeoutError as error:
            message = "too many large requests are being read; try again later"
            raise ApiError(503, message, code="prompt_workers_busy", retry_after=5) from error
        try:
            worker = self._take()
            try:
                yield worker
            finally:
                self._put_back(worker)
        finally:
            self._places.release()
            self._keep_one_ready()

    def _put_back(self, worker: _Worker) -> None:
        self._busy.remove(worker)
        if worker.is_free and len(self._busy) + len(self._idle) < self._size:
            self._idle.append(worker)
        else:
            worker.kill()

    def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                break
            worker.kill()
        else:
            worker = _Worker(self._settings, self._niceness)
        self._busy.add(worker)
        self._keep_one_ready()
        return worker

    def _keep_one_ready(self) -> None:
        if not self._idle and len(self._busy) < self._size:
            try:
                self.start()
            except OSError as error:  # the machine has no room for one; the next request tries again
                LOG.warning("no process to prepare requests can be started: %s", error)


class _Worker:
    """One process and the connection to it."""

    def __init__(self, settings: PromptSettings, niceness: int) -> None:
        self._socket, theirs = socket.socketpair()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self.is_free = True
        """The last reply has come whole and the process takes another request."""
        spawn = multiprocessing.get_context("spawn")
        with theirs:
            self._process = spawn.Process(
                target=run_worker, args=(theirs, settings, niceness), name="fuseline-prompts", daemon=True
            )
            self._process.start()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    async def wait_ready(self) -> None:
        """Raises EOFError when the process could not start."""
        if self._streams is not None:
            return
        self.is_free = False
        self._streams = await asyncio.open_unix_connection(sock=self._socket, limit=READ_BYTES)
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._receive()
        except TimeoutError as error:
            raise EOFError("the process does not start") from error

    async def prepare(self, kind: str, pieces: Sequence[bytes]) -> Reply:
        """Raises EOFError or OSError when the process ends."""
        self.is_free = False
        writer = self._streams[1]
        for piece in (kind.encode(), *pieces):
            if piece:
                writer.write(frame(piece))
                await writer.drain()
        writer.write(frame(b""))
        header, *rest = await self._receive()
        reply = self._decoder.decode(memoryview(header)[1:])
        self.is_free = header[:1] == GOES_ON
        return Written(rest, reply.unknown) if isinstance(reply, Written) else reply

    def kill(self) -> None:
        self._process.kill()
        if self._streams is None:
            self._socket.close()
        else:
            self._streams[1].transport.abort()

    async def _receive(self) -> list[bytes]:
        reader = self._streams[0]
        frames = []
        while size := int.from_bytes(await reader.readexactly(4), "little"):
            frames.append(await reader.readexactly(size))
        return frames
