"""The process that compiles grammars, within bounds of memory; its parent ends it when one takes too long.

Messages in both directions are frames: length as little-endian uint32, then msgpack. The first is the vocabulary,
answered when the process is ready; each further one is a GrammarSpec, answered by a `Compiled` or a `Failed`.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from typing import TYPE_CHECKING, BinaryIO

import msgspec
import numpy as np

from fuseline.engine.memory.limit_memory import limit_memory
from fuseline.engine.messages import GrammarSpec, Vocabulary

if TYPE_CHECKING:
    import xgrammar as xg

NICENESS = 10
INTERNAL = re.compile(r"(\[[\d:]+\] )?\S+\.(cc|h):\d+: |Check failed: \(.*?\) is false:? ?")
"""What xgrammar writes in front of its words."""
TRIAL_TOKENS = 64
"""Tokens that a compiled grammar is walked along, so that one that is slow or faulty is found out here."""


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """The grammar compiles within the bounds, so the engine may do the same (xgrammar writes and reads a compiled
    grammar as JSON, which takes ten times as long).
    """

    num_bytes: int


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
    info = tokenizer_info(vocabulary)
    limit_memory(num_bytes)
    write_frame(outbox, b"ready")
    while data := read_frame(inbox):
        write_frame(outbox, msgspec.msgpack.encode(_answer(msgspec.msgpack.decode(data, type=GrammarSpec), info)))


def tokenizer_info(vocabulary: Vocabulary) -> xg.TokenizerInfo:
    """The vocabulary as xgrammar has it. Tokens without bytes are special: no text of a grammar has them."""
    import xgrammar as xg

    tokens, size = list(vocabulary.tokens), vocabulary.vocab_size
    return xg.TokenizerInfo(
        tokens[:size], vocab_type=xg.VocabType.RAW, vocab_size=size, stop_token_ids=list(vocabulary.eos_token_ids)
    )


def read_frame(stream: BinaryIO) -> bytes:
    """Empty at the end of the stream."""
    return stream.read(int.from_bytes(stream.read(4), "little"))


def write_frame(stream: BinaryIO, data: bytes) -> None:
    stream.write(len(data).to_bytes(4, "little"))
    stream.write(data)
    stream.flush()


def _answer(spec: GrammarSpec, info: xg.TokenizerInfo) -> Answer:
    try:
        compiled = compile_grammar(spec, info)
        _walk(compiled, info)
        return Compiled(compiled.memory_size_bytes)
    except MemoryError:
        return Failed("it needs more memory than this server gives to one (--grammar-memory)")
    except Exception as error:  # xgrammar's errors have no common class
        return Failed(_message(error))


def compile_grammar(spec: GrammarSpec, info: xg.TokenizerInfo) -> xg.CompiledGrammar:
    """Leaves the interpreter to other threads meanwhile."""
    import xgrammar as xg

    compiler = xg.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    if spec.kind == "ebnf":
        return compiler.compile_grammar(spec.text)
    if spec.kind == "lark":
        return compiler.compile_lark(spec.text)
    return compiler.compile_structural_tag(json.loads(spec.text))


def _walk(compiled: xg.CompiledGrammar, info: xg.TokenizerInfo) -> None:
    """Raises ValueError for a grammar without any text."""
    import xgrammar as xg

    matcher, rng = xg.GrammarMatcher(compiled), random.Random(0)
    mask = xg.allocate_token_bitmask(1, info.vocab_size)
    for index in range(TRIAL_TOKENS):
        mask.fill_(-1)
        matcher.fill_next_token_bitmask(mask)
        allowed = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: info.vocab_size].nonzero()[0]
        if not len(allowed):
            if index:
                return  # a random text may be one that no token goes on from
            raise ValueError("no token of this model can begin a text of the grammar")
        if not matcher.accept_token(int(rng.choice(allowed))) or matcher.is_terminated():
            return


def _message(error: Exception) -> str:
    """What went wrong, without the places and conditions of xgrammar's sources."""
    text = INTERNAL.sub("", " ".join(str(error).split()))
    return text[:500] or f"{type(error).__name__} in the grammar's backend"


if __name__ == "__main__":
    main(int(sys.argv[1]))
