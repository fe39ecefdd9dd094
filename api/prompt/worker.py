"""A process that prepares requests, one after the other, within bounds of time and memory.

Messages in both directions are frames (length as little-endian uint32, then the bytes) that an empty frame ends. A job
is the kind of its body and the body's pieces; a reply is one frame of `Reply` behind a byte that says whether the
process goes on, then the pieces of a `Written`.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from io import BufferedRWPair

import msgspec

from fuseline.api.prompt.encode import open_tokenizer
from fuseline.api.prompt.prepare import Preparer, PromptSettings
from fuseline.api.prompt.prepared import Refused, Reply, Written
from fuseline.engine.memory.limit_memory import limit_memory

GOES_ON, ENDS = b"+", b"-"
MAX_GROWTH = 256 * 1024
"""KiB of memory that a process may keep after a request; one that took more makes room for a fresh one."""
GRACE_SECONDS = 1.0
"""How long after its time a process waits to be ended before it ends itself: its parent may be gone."""


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


def run_worker(connection: socket.socket, settings: PromptSettings, niceness: int, num_bytes: int) -> None:
    """Entry of the process; it ends with its connection. The first message says that it is ready.

    `num_bytes`: memory that it may take for a request.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    os.nice(niceness)
    config = settings.config
    tokenizer = open_tokenizer(config)
    preparer = Preparer(settings, tokenizer)
    if tokenizer is not None:
        _ = tokenizer.bytes_per_token  # computed once, here
    limit_memory(num_bytes)
    stream = connection.makefile("rwb")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MAX_GROWTH
    with suppress(ConnectionError):  # the parent has ended
        _write(stream, [GOES_ON])
        goes_on = True
        while goes_on and (job := _read(stream)):
            signal.setitimer(signal.ITIMER_REAL, config.prompt_timeout + GRACE_SECONDS)  # SIGALRM ends the process
            reply, goes_on = _prepare(preparer, job)
            signal.setitimer(signal.ITIMER_REAL, 0)
            goes_on = goes_on and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most
            _reply(stream, reply, goes_on)


def _reply(stream: BufferedRWPair, reply: Reply, goes_on: bool) -> None:
    pieces = reply.pieces if isinstance(reply, Written) else []
    header = msgspec.structs.replace(reply, pieces=[]) if pieces else reply
    _write(stream, [(GOES_ON if goes_on else ENDS) + msgspec.msgpack.encode(header), *pieces])


def _prepare(preparer: Preparer, job: list[bytes]) -> tuple[Reply, bool]:
    """The reply and whether the process is fit for another job."""
    kind, *pieces = job
    job.clear()
    try:
        return preparer.prepare(kind.decode(), b"".join(pieces)), True
    except MemoryError:
        message = "the request needs more memory to be read, rendered and encoded than this server gives to one"
        return Refused(400, f"{message} (--prompt-memory)", None, "request_too_large"), False


def _read(stream: BufferedRWPair) -> list[bytes]:
    """The frames of a message; none at the end of the connection."""
    frames = []
    while size := int.from_bytes(stream.read(4), "little"):
        frames.append(stream.read(size))
    return frames


def _write(stream: BufferedRWPair, frames: Iterable[bytes]) -> None:
    for data in frames:
        stream.write(len(data).to_bytes(4, "little"))
        stream.write(data)
    stream.write(frame(b""))
    stream.flush()
