"""The engine's own process: messages over two zmq sockets in a private directory."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait

import msgspec
import zmq

from fuseline.engine.build import BuildModel, FindDevice
from fuseline.engine.config import EngineConfig
from fuseline.engine.messages import FromEngine, ToEngine

REQUESTS, ANSWERS = "requests", "answers"
WAKE_ADDRESS = "inproc://wake"
LINGER_MS = 1000
"""How long the last messages (why a start failed) may wait to be taken."""


def run_engine_process(folder: str, config: EngineConfig, build_model: BuildModel, find_device: FindDevice) -> None:
    """Entry of the process. Exits 0 on shutdown or after a failed start, 1 on a fault."""
    # The parent decides when this process ends: a Ctrl-C or SIGTERM to the whole group must not cut requests off.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    context = zmq.Context()
    requests = open_socket(context, zmq.PULL, folder, REQUESTS)
    answers = open_socket(context, zmq.PUSH, folder, ANSWERS)
    outbox = ZmqOutbox(answers)
    death: Exception | None = None
    try:
        serve = _import_serve()
        serve(config, build_model, find_device, ZmqInbox(requests), outbox.send)
    except Exception as error:
        death = error
        log_death(error)
    finally:
        outbox.close()
        context.destroy(linger=LINGER_MS)
    if death is not None:
        # Tensors on a GPU that failed cannot be freed, hence are kept alive: their destructors would abort, and a core
        # file be written while the next engine waits for the memory.
        logging.shutdown()
        os._exit(1)


def _import_serve() -> Callable[..., None]:
    """service.serve; it needs torch, which those who only talk to an engine do without."""
    # What is imported is no garbage: searching it takes a tenth of the time here, and more in later collections.
    gc.disable()
    try:
        from fuseline.engine.service import serve
    finally:
        gc.freeze()
        gc.enable()
    return serve


def log_death(error: Exception) -> None:
    """One line with the cause, which of a GPU's faults is the first of several, then where it came from."""
    cause = str(error).strip().partition("\n")[0]
    logging.getLogger("fuseline.engine").error(
        "the engine died: %s: %s", type(error).__name__, cause, exc_info=error
    )  # fmt: skip


class ZmqOutbox:
    """Messages to the client from any thread; what comes after `close` is dropped."""

    def __init__(self, socket: zmq.Socket) -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        with self._lock:
            if not self._socket.closed:
                self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        with self._lock:
            self._socket.close(linger=LINGER_MS)


class ZmqInbox:
    def __init__(self, socket: zmq.Socket) -> None:
        self._socket = socket
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._socket.bind(WAKE_ADDRESS)
        self._bell = socket.context.socket(zmq.PUSH)
        self._bell.connect(WAKE_ADDRESS)
        self._lock = threading.Lock()

    def wake(self) -> None:
        with self._lock:
            if not self._bell.closed:
                self._bell.send(b"")

    def receive(self, wait: bool) -> ToEngine | None:
        try:
            data = self._socket.recv(0 if wait else zmq.NOBLOCK)
            return self._decoder.decode(data) if data else None
        except zmq.Again:
            return None


def open_socket(context: zmq.Context, kind: int, folder: str, name: str, bind: bool = False) -> zmq.Socket:
    """A socket without a limit on queued messages: neither side may block on the other or drop anything."""
    socket = context.socket(kind)
    socket.set_hwm(0)
    # A context ends with its process; closing one must never wait for a peer that is gone.
    socket.linger = LINGER_MS
    address = f"ipc://{os.path.join(folder, name)}"
    if bind:
        socket.bind(address)
    else:
        socket.connect(address)
    return socket


def answer_decoder() -> msgspec.msgpack.Decoder:
    return msgspec.msgpack.Decoder(FromEngine)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
