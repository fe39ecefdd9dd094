"""torch.cuda's streams and graphs without a GPU: tensors are the CPU's, and what a capture must not do fails as there.

Rules of the CUDA programming guide and of torch 2.11's graphs: a thread whose capture of mode thread_local is under way
waits for nothing; nobody waits for the whole device meanwhile; a spoilt capture cannot be ended, and torch's allocator
then goes on believing that it records. cuBLAS writes to a workspace of the thread and stream that it is called on.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SPOILT = "operation failed due to a previous error during capture"
PRODUCTS = ("mm", "addmm", "bmm", "linear")


@dataclass(eq=False)
class FakeStream:
    cuda: FakeCuda
    name: str
    device: torch.device = torch.device("cpu")
    waited_for: list[FakeStream] = field(default_factory=list)

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other)

    def synchronize(self) -> None:
        self.cuda.refuse_while_capturing()


class FakeCuda(TorchDispatchMode):
    """A mode is of the thread that enters it: `recorded` has the products of one thread.

    `recorded`: (stream, whether captured) of each product. `recording`: pools that the allocator believes recorded to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._local = threading.local()
        self._pools = count(1)
        self._streams = count(1)
        self.default = FakeStream(self, "default")
        self.capturing: set[FakeGraph] = set()
        self.recording: set[tuple[int, int]] = set()
        self.uses: dict[tuple[int, int], int] = {}
        self.recorded: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in PRODUCTS:
            self.recorded.append((self.current().name, self.captured_here() is not None))
        return func(*args, **(kwargs or {}))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda, fake = torch.cuda, self

        # Classes, for libraries whose annotations name them.
        class Stream(FakeStream):
            def __init__(self, device: object = None) -> None:
                super().__init__(fake, f"stream {next(fake._streams)}")

        class CUDAGraph(FakeGraph):
            def __init__(self) -> None:
                super().__init__(fake)

        monkeypatch.setattr(cuda, "Stream", Stream)
        monkeypatch.setattr(cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, next(self._pools)))
        monkeypatch.setattr(cuda, "default_stream", lambda device=None: self.default)
        monkeypatch.setattr(cuda, "current_device", lambda: 0)
        monkeypatch.setattr(cuda, "stream", self.on)
        monkeypatch.setattr(cuda, "synchronize", self.wait_for_all)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.stop_recording(pool))
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.release(pool))

    def current(self) -> FakeStream:
        return getattr(self._local, "stream", self.default)

    def captured_here(self) -> FakeGraph | None:
        return next((graph for graph in self.capturing if graph.thread == threading.get_ident()), None)

    @contextmanager
    def on(self, stream: FakeStream):
        before, self._local.stream = self.current(), stream
        try:
            yield
        finally:
            self._local.stream = before

    def refuse_while_capturing(self) -> None:
        graph = self.captured_here()
        if graph is not None:
            graph.is_spoilt = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def wait_for_all(self, device: object = None) -> None:
        for graph in self.capturing:
            graph.is_spoilt = True
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    def stop_recording(self, pool: tuple[int, int]) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, pool: tuple[int, int]) -> None:
        self.uses[pool] -= 1


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.is_spoilt = self.is_made = False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        cuda = self._cuda
        assert cuda.current() is not cuda.default and capture_error_mode == "thread_local"
        if pool in cuda.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        cuda.recording.add(pool)
        cuda.uses[pool] = cuda.uses.get(pool, 0) + 1
        cuda.capturing.add(self)
        self.pool, self.thread = pool, threading.get_ident()

    def capture_end(self) -> None:
        self._cuda.capturing.remove(self)
        if self.is_spoilt:
            raise RuntimeError(SPOILT)
        self._cuda.stop_recording(self.pool)
        self.is_made = True

    def replay(self) -> None:
        assert self.is_made
