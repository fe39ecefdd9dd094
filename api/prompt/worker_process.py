"""One worker process as the server sees it: its start, the connection to it, and its end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import TYPE_CHECKING

import msgspec

from fuseline.api.prompt.prepared import Reply, Written
from fuseline.api.prompt.worker import GOES_ON, frame, run_worker

if TYPE_CHECKING:
    from fuseline.api.prompt.prepare import PromptSettings

READ_BYTES = 256 * 1024
CPU_CLOCK = 2
"""CPUCLOCK_SCHED of Linux."""
START_SECONDS = 60
"""Within which a process must have loaded the tokenizer."""


def start_context() -> ForkServerContext | SpawnContext:
    """Processes are forked from one that has imported all they need: 10 ms instead of a second."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The command line's module too: each process imports the main script, whatever it needs of it.
    context.set_forkserver_preload([run_worker.__module__, "fuseline.api.cli"])
    return context


class WorkerProcess:
    """Takes one request at a time."""

    def __init__(self, settings: PromptSettings, niceness: int, num_bytes: int) -> None:
        """`num_bytes`: memory that it may take for a request."""
        self._socket, theirs = socket.socketpair()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._is_slowed = False
        self._has_replied = True
        with theirs:
            self._process = start_context().Process(
                target=run_worker, args=(theirs, settings, niceness, num_bytes), name="fuseline-prompts", daemon=True
            )
            self._process.start()

    @property
    def is_alive(self) -> bool:
        has_closed = self._streams is not None and self._streams[0].at_eof()
        return not has_closed and self._process.is_alive()

    @property
    def is_free(self) -> bool:
        """The last reply has come whole and the process is fit for another request."""
        return self._has_replied and not self._is_slowed

    async def wait_ready(self) -> None:
        """Raises EOFError when the process could not start."""
        if self._streams is not None:
            return
        self._has_replied = False
        self._streams = await asyncio.open_unix_connection(sock=self._socket, limit=READ_BYTES)
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._receive()
        except TimeoutError as error:
            raise EOFError("the process does not start") from error

    async def prepare(self, kind: str, pieces: Sequence[bytes]) -> Reply:
        """Raises EOFError or OSError when the process ends."""
        self._has_replied = False
        writer = self._streams[1]
        for piece in (kind.encode(), *pieces):
            if piece:
                writer.write(frame(piece))
                await writer.drain()
        writer.write(frame(b""))
        header, *rest = await self._receive()
        reply = self._decoder.decode(memoryview(header)[1:])
        self._has_replied = header[:1] == GOES_ON
        return Written(rest, reply.unknown) if isinstance(reply, Written) else reply

    def cpu_seconds(self) -> float:
        """Processor time used so far; where the system does not tell of another process, the time that has passed."""
        try:
            return time.clock_gettime(~self._process.pid << 3 | CPU_CLOCK)  # as clock_getcpuclockid(3) makes it
        except OSError:
            return time.monotonic()

    def slow_down(self, niceness: int) -> None:
        """Let all others run first. An unprivileged server cannot take that back."""
        self._is_slowed = True
        with suppress(OSError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness)

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
