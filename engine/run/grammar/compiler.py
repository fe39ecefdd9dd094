"""Compiles grammars beside the engine's steps: in processes that are ended when one takes too long or too much."""

from __future__ import annotations

import logging
import queue
import selectors
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from fuseline.engine.config import GrammarConfig
from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.interface import Grammar
from fuseline.engine.run.grammar.backends.registry import Backends
from fuseline.engine.run.grammar.worker import Answer, Failed, read_frame, write_frame

logger = logging.getLogger("fuseline.engine")

START_SECONDS = 120.0
"""How long a process may take to start, on a machine under load."""


class GrammarError(Exception):
    """A grammar that cannot be compiled; the message is fit for the client."""


class GrammarCompiler:
    """Called by the engine's thread, all methods but `on_ready`, which is called by others when something is compiled.

    A compiled grammar is kept while there is room for it (`GrammarConfig.cache_bytes`).
    """

    def __init__(self, config: GrammarConfig, vocab_size: int) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self.num_compiled = 0
        self._config = config
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None
        self._backends: Backends | None = None
        self._backends_lock = threading.Lock()
        self._cache: OrderedDict[bytes, tuple[Grammar, int]] = OrderedDict()
        self._pending: set[bytes] = set()
        self._finished: queue.SimpleQueue[tuple[bytes, tuple[Grammar, int] | GrammarError]] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(config.grammar_workers, "fuseline-grammar")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()

    @property
    def vocabulary(self) -> Vocabulary:
        """Empty where the server runs without a tokenizer."""
        return self._vocabulary or Vocabulary(tokens=(), eos_token_ids=(), vocab_size=self._vocab_size)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Tokens as bytes; the model may have more, which no grammar allows."""
        self._vocabulary = msgspec.structs.replace(vocabulary, vocab_size=self._vocab_size)

    def warm_up(self) -> None:
        """Starts a process and imports what the first request would wait for, by a grammar of nobody's."""
        self.start(GrammarSpec(kind="ebnf", text='root ::= "a"'))

    def find(self, spec: GrammarSpec) -> Grammar | None:
        """The compiled grammar, if it is there."""
        found = self._cache.get(spec.key)
        if found is None:
            return None
        self._cache.move_to_end(spec.key)
        return found[0]

    def start(self, spec: GrammarSpec) -> None:
        """Compile a grammar; `take_finished` tells when that is done."""
        if spec.key not in self._pending:
            self._pending.add(spec.key)
            self._pool.submit(self._run, spec)

    def take_finished(self) -> list[tuple[bytes, Grammar | GrammarError]]:
        """Keys of grammars that have been compiled, or could not be, since the last call."""
        done = []
        while not self._finished.empty():
            key, result = self._finished.get()
            self._pending.discard(key)
            if isinstance(result, GrammarError):
                done.append((key, result))
            else:
                self._keep(key, result)
                done.append((key, result[0]))
        return done

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()

    def _keep(self, key: bytes, result: tuple[Grammar, int]) -> None:
        self.num_compiled += 1
        self._cache[key] = result
        while sum(size for _, size in self._cache.values()) > self._config.grammar_cache_bytes and len(self._cache) > 1:
            self._cache.popitem(last=False)

    def _run(self, spec: GrammarSpec) -> None:
        """In a thread of the pool."""
        try:
            result: tuple[Grammar, int] | GrammarError = self._compile(spec)
        except GrammarError as error:
            result = error
        except Exception:
            logger.exception("a grammar could not be compiled")
            result = GrammarError("the grammar could not be compiled: an internal error")
        self._finished.put((spec.key, result))
        self.on_ready()

    def _compile(self, spec: GrammarSpec) -> tuple[Grammar, int]:
        if self._vocabulary is None:
            raise GrammarError("structured output needs a tokenizer; this server runs without one")
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker(self._vocabulary, self._config.grammar_memory)
            self._workers.add(worker)
        try:
            answer = worker.compile(spec, self._config.grammar_timeout)
        except BaseException:
            worker.kill()
            self._workers.discard(worker)
            raise
        self._idle.put(worker)
        if isinstance(answer, Failed):
            raise GrammarError(f"the grammar cannot be compiled: {answer.message}")
        if answer.num_bytes > self._config.grammar_cache_bytes:
            raise GrammarError("the compiled grammar is too large (--grammar-cache-bytes)")
        grammar = self._load(spec, answer.data)
        grammar.is_slow = answer.is_slow
        return grammar, answer.num_bytes

    def _load(self, spec: GrammarSpec, data: bytes) -> Grammar:
        """Compile once more, now that it is known to take little time and memory, unless the worker has sent `data`."""
        with self._backends_lock:
            if self._backends is None:
                self._backends = Backends(self._vocabulary)
            backend = self._backends.get(spec.backend)
        return backend.unpack(spec, data)


class _Worker:
    """One process. Raises GrammarError when a grammar takes too long or ends it; it is of no use then."""

    def __init__(self, vocabulary: Vocabulary, num_bytes: int) -> None:
        command = [sys.executable, "-P", "-m", "fuseline.engine.run.grammar.worker", str(num_bytes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._vocabulary: Vocabulary | None = vocabulary

    def compile(self, spec: GrammarSpec, timeout: float) -> Answer:
        try:
            if self._vocabulary is not None:
                self._ask(self._vocabulary, START_SECONDS)
                self._vocabulary = None
            data = self._ask(spec, timeout)
        except OSError:
            data = b""
        if data is None:
            raise GrammarError(f"the grammar takes more than {timeout:g} s to compile (--grammar-timeout)")
        if not data:
            raise GrammarError("the grammar takes too much memory to compile (--grammar-memory), or is faulty")
        return msgspec.msgpack.decode(data, type=Answer)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except OSError:
                continue  # what was not sent has nobody to go to

    def _ask(self, message: Vocabulary | GrammarSpec, timeout: float) -> bytes | None:
        """The answer, empty if the process has ended; None when it is too late."""
        write_frame(self._process.stdin, msgspec.msgpack.encode(message))
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return read_frame(self._process.stdout) if selector.select(timeout) else None
