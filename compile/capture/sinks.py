"""Destinations of loaded weights: host memory, or a GPU through a ring of pinned buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from queue import SimpleQueue

import torch
from torch import Tensor

from fuseline.compile.capture.reader import BLOCK_BYTES, box_of, cut, write_box
from fuseline.compile.memory import Pages

NUM_BUFFERS = 8
"""More than there are readers, so that one reads on while the copies of all are under way."""


class HostSink:
    """Weights in host memory. A sink is used by several threads at once, each with tensors of its own."""

    device = torch.device("cpu")
    """Device that holds the weights."""

    def __init__(self) -> None:
        self._pages = Pages()

    def zeros(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of that request, to be written slice by slice."""
        return self._pages.zeros(shape, dtype)

    def write(self, target: Tensor, block: Tensor, start: tuple[int, ...]) -> None:
        """Copies the block, which may be overwritten afterwards, to target[start : start + block.shape]."""
        write_box(target, block, start)

    def finish(self) -> None:
        """Returns when all that was written is there."""


class DeviceSink:
    """Weights on a GPU. Host memory holds only the ring and the readers' blocks, for any model size.

    A block is converted into a buffer of the ring and copied from there while the next ones are read. `on_host`:
    tensors by key that stay in host memory instead.
    """

    def __init__(
        self, device: torch.device, on_host: Mapping[str, Tensor] | None = None, copies: Copies | None = None
    ) -> None:
        self.device = device
        self._on_host = on_host or {}
        self._host_ids = {id(tensor) for tensor in self._on_host.values()}
        self._copies = copies or Copies(device.type == "cuda")
        self._ring: SimpleQueue[tuple[Tensor, Callable[[], None]]] = SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._ring.put((self._copies.buffer(BLOCK_BYTES), lambda: None))

    def zeros(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = self._on_host.get(key)
        return torch.zeros(shape, dtype=dtype, device=self.device) if found is None else found

    def write(self, target: Tensor, block: Tensor, start: tuple[int, ...]) -> None:
        if id(target) in self._host_ids or block.device.type != "cpu":
            # Dummy weights are on the GPU already.
            write_box(target, block, start)
            return
        for at, part in cut(start, block.contiguous(), BLOCK_BYTES // target.element_size()):
            self._send(box_of(target, at, part.shape), part)

    def finish(self) -> None:
        for _ in range(NUM_BUFFERS):
            buffer, wait = self._ring.get()
            wait()
            self._ring.put((buffer, lambda: None))

    def _send(self, box: Tensor, part: Tensor) -> None:
        buffer, wait = self._ring.get()
        wait()
        staged = buffer[: box.numel() * box.element_size()].view(box.dtype).view(box.shape)
        staged.copy_(part)
        self._ring.put((buffer, self._copies.copy(box, staged)))


Sink = HostSink | DeviceSink


class Copies:
    """Copies of the ring on the current stream, which is the default one in the threads that read."""

    def __init__(self, is_cuda: bool) -> None:
        self._is_cuda = is_cuda

    def buffer(self, num_bytes: int) -> Tensor:
        """Host memory [num_bytes] uint8 that can be copied from without waiting."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Starts to copy. What comes back waits for the end of it."""
        target.copy_(source, non_blocking=True)
        if not self._is_cuda:
            return lambda: None
        done = torch.cuda.Event(blocking=True)
        done.record()
        return done.synchronize
