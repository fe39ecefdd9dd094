"""The process that compiles grammars, within bounds of memory; its parent ends it when one takes too long.

Messages in both directions are frames: length as little-endian uint32, then msgpack. The first is the vocabulary,
answered when the process is ready; each further one is a GrammarSpec, answered by a `Compiled` or a `Failed`.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from typing import BinaryIO

import msgspec
import numpy as np
import torch

from fuseline.engine.memory.limit_memory import limit_memory
from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.interface import Grammar
from fuseline.engine.run.grammar.backends.registry import Backends
from fuseline.engine.run.grammar.matcher import STALL_SECONDS

NICENESS = 10
INTERNAL = re.compile(r"(\[[\d:]+\] )?\S+\.(cc|h):\d+: |Check failed: \(.*?\) is false:? ?")
"""What xgrammar writes in front of its words."""
TRIAL_TOKENS = 64
"""Tokens that a compiled grammar is walked along, so that one that is slow or faulty is found out here."""
NO_MEMORY = "bad_alloc"
"""In the message of an exception from C++ for want of memory."""
KEEPS_INTERPRETER = ("lm-format-enforcer",)
"""Backends that compile in Python, where the engine's steps wait for them."""
MOST_SECONDS_HERE = 0.5
"""Time that compiling may take in the engine's process where its steps wait."""


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """The grammar compiles within the bounds, so the engine may do the same where there is no data."""

    num_bytes: int
    data: bytes = b""
    """The compiled grammar, where reading it takes less time than compiling it anew."""
    is_slow: bool = False
    """One of its masks takes so long that no step shall wait for them."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    message: str


Answer = Compiled | Failed


def main(num_bytes: int) -> None:
    """Serves stdin to stdout until stdin ends. `num_bytes`: memory for grammars."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    os.nice(NICENESS)
    inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log
    vocabulary = msgspec.msgpack.decode(read_frame(inbox), type=Vocabulary)
    backends = Backends(vocabulary)
    backends.get("xgrammar")
    limit_memory(num_bytes)
    write_frame(outbox, b"ready")
    while data := read_frame(inbox):
        spec = msgspec.msgpack.decode(data, type=GrammarSpec)
        write_frame(outbox, msgspec.msgpack.encode(_answer(spec, backends, vocabulary.vocab_size)))


def read_frame(stream: BinaryIO) -> bytes:
    """Empty at the end of the stream."""
    return stream.read(int.from_bytes(stream.read(4), "little"))


def write_frame(stream: BinaryIO, data: bytes) -> None:
    stream.write(len(data).to_bytes(4, "little"))
    stream.write(data)
    stream.flush()


def _answer(spec: GrammarSpec, backends: Backends, vocab_size: int) -> Answer:
    try:
        backend = backends.get(spec.backend)
        begin = time.thread_time()
        grammar = backend.compile(spec)
        seconds = time.thread_time() - begin
        slowest = try_walk(grammar, vocab_size)
        data = grammar.pack()
    except Exception as error:  # the packages' errors have no common class
        if isinstance(error, MemoryError) or NO_MEMORY in str(error):
            return Failed("it needs more memory than this server gives to one (--grammar-memory)")
        return Failed(_message(error))
    if spec.backend in KEEPS_INTERPRETER and seconds > MOST_SECONDS_HERE:
        return Failed(f"{spec.backend} takes {seconds:.1f} s to compile it, in which nothing else could run")
    return Compiled(grammar.num_bytes, data, is_slow=spec.is_slow or slowest > STALL_SECONDS)


def try_walk(grammar: Grammar, vocab_size: int) -> float:
    """Seconds that the slowest mask along a random text takes. Raises ValueError for a grammar without any text."""
    matcher, rng = grammar.matcher(()), random.Random(0)
    mask = torch.empty((1, -(-vocab_size // 32)), dtype=torch.int32)
    slowest, begin = 0.0, time.thread_time()
    for index in range(TRIAL_TOKENS):
        mask.fill_(-1)
        matcher.fill_next_token_bitmask(mask)
        slowest = max(slowest, time.thread_time() - begin)
        allowed = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[:vocab_size].nonzero()[0]
        if not len(allowed):
            if index:
                break  # a random text may be one that no token goes on from
            raise ValueError("no token of this model can begin a text of the grammar")
        begin = time.thread_time()
        if not matcher.accept_token(int(rng.choice(allowed))) or matcher.is_terminated():
            break
    return slowest


def _message(error: Exception) -> str:
    """What went wrong, without the places and conditions of xgrammar's sources."""
    text = INTERNAL.sub("", " ".join(str(error).split()))
    return text[:500] or f"{type(error).__name__} in the grammar's backend"


if __name__ == "__main__":
    main(int(sys.argv[1]))
