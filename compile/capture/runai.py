"""Reading through Run:ai's model streamer, whose threads read parts of a block at the same time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock

from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.errors import LoadError, one_line

CONCURRENCY = "RUNAI_STREAMER_CONCURRENCY"


def streamed(stored: Mapping[str, StoredTensor], extra: Mapping[str, object]) -> dict[str, StoredTensor]:
    """The same tensors, read by the streamer. `extra`: --model-loader-extra-config."""
    streamer = Streamer(extra.get("concurrency"), extra.get("memory_limit"))
    return {name: replace(tensor, fill=streamer.fill) for name, tensor in stored.items()}


class Streamer:
    """One streamer of the package, which any thread may use in turn."""

    def __init__(self, concurrency: int | None, memory_limit: int | None) -> None:
        if concurrency is not None:
            os.putenv(CONCURRENCY, str(concurrency))  # the library has no other way to be told
        from runai_model_streamer import FileStreamer

        self._streamer = FileStreamer().__enter__()
        self._memory_limit, self._lock = memory_limit, Lock()
        weakref.finalize(self, self._streamer.__exit__, None, None, None)

    def fill(self, path: Path, target: memoryview, at: int) -> None:
        """Read bytes [at, at + len(target)) of a file. Raises LoadError."""
        from runai_model_streamer.file_streamer.requests_iterator import FileChunks

        with self._lock:
            try:
                wanted = FileChunks(0, str(path), [at], [len(target)])
                self._streamer.stream_files([wanted], memory_limit=self._memory_limit)
                for _, _, block in self._streamer.get_chunks():
                    target[:] = memoryview(block.flatten().numpy())
            except Exception as error:  # the package raises many kinds
                raise LoadError(f"{path} cannot be read by the streamer at byte {at}: {one_line(error)}") from error
