"""How the client reaches its engine: over sockets to another process, or over queues to a thread."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from fuseline.engine.build import BuildModel, FindDevice
from fuseline.engine.config import EngineConfig
from fuseline.engine.messages import FromEngine, Shutdown, ToEngine
from fuseline.engine.process import ANSWERS, REQUESTS, answer_decoder, log_death, open_socket, run_engine_process


@dataclass(frozen=True)
class EngineSetup:
    config: EngineConfig
    build_model: BuildModel
    find_device: FindDevice


class Transport(Protocol):
    """Callbacks run in the event loop: `on_message` for each message, `on_end` once, when the engine is gone."""

    def send(self, message: ToEngine) -> None: ...

    async def stop(self, timeout: float) -> None:
        """End the engine, by force after `timeout` seconds."""


class ProcessTransport:
    def __init__(
        self, setup: EngineSetup, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]
    ) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._folder = tempfile.mkdtemp(prefix="fuseline-")  # mode 0700
        self._context = zmq.asyncio.Context()
        # Sending never waits (no limit on queued messages), so it needs no coroutine.
        self._requests = open_socket(zmq.Context(self._context), zmq.PUSH, self._folder, REQUESTS, bind=True)
        self._answers = open_socket(self._context, zmq.PULL, self._folder, ANSWERS, bind=True)
        self._encoder = msgspec.msgpack.Encoder()
        self._is_open = True
        self._ended = asyncio.Event()
        arguments = (self._folder, setup.config, setup.build_model, setup.find_device)
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=run_engine_process, args=arguments, name="fuseline-engine", daemon=True)
        try:
            self.process.start()
        except BaseException:
            self._release()
            raise
        self._loop.add_reader(self.process.sentinel, self._process_ended)
        self._reading = self._loop.create_task(self._read())

    def send(self, message: ToEngine) -> None:
        if not self._is_open:
            return
        # Again: the process has hung up and is about to be seen dead, which fails whatever was in flight.
        with suppress(zmq.Again):
            self._requests.send(self._encoder.encode(message), zmq.NOBLOCK)

    async def stop(self, timeout: float) -> None:
        self.send(Shutdown())
        try:
            await asyncio.wait_for(self._ended.wait(), timeout)
        except TimeoutError:
            self.process.kill()
            await self._ended.wait()

    def _process_ended(self) -> None:
        self._loop.remove_reader(self.process.sentinel)
        self._is_open = False
        self._closing = self._loop.create_task(self._close())

    async def _close(self) -> None:
        """Reads the last messages of the process too (why it could not start), then ends."""
        await asyncio.sleep(0.05)
        self._reading.cancel()
        self.process.join()
        self._release()
        self._ended.set()
        self._on_end()

    def _release(self) -> None:
        """Closes the sockets: a context that is collected with open ones waits for them without end."""
        for socket in (self._requests, self._answers):
            socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _read(self) -> None:
        decoder = answer_decoder()
        while True:
            self._on_message(decoder.decode(await self._answers.recv()))


class ThreadTransport:
    """The engine in a thread of this process. It cannot be killed: stopping waits for the running step."""

    def __init__(
        self, setup: EngineSetup, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]
    ) -> None:
        self._inbox = QueueInbox()
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._on_message = on_message
        self._on_end = on_end
        self._thread = threading.Thread(target=self._run, args=(setup,), name="fuseline-engine", daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    async def stop(self, timeout: float) -> None:
        self.send(Shutdown())
        try:
            await asyncio.wait_for(self._ended.wait(), timeout)
        except TimeoutError:
            logging.getLogger("fuseline.engine").warning("the engine's thread did not stop in %g s", timeout)

    def _run(self, setup: EngineSetup) -> None:
        from fuseline.engine.service import serve  # torch: not for those who only talk to an engine

        try:
            serve(setup.config, setup.build_model, setup.find_device, self._inbox, self._post)
        except Exception as error:
            log_death(error)
        self._in_loop(self._end)

    def _end(self) -> None:
        self._ended.set()
        self._on_end()

    def _post(self, message: FromEngine) -> None:
        self._in_loop(self._on_message, message)

    def _in_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            # The loop is closed: nobody is left to tell.
            self._inbox.put(Shutdown())


class QueueInbox:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()

    def put(self, message: ToEngine) -> None:
        self._queue.put(message)

    def wake(self) -> None:
        self._queue.put(None)

    def receive(self, wait: bool) -> ToEngine | None:
        try:
            return self._queue.get(block=wait)
        except queue.Empty:
            return None
