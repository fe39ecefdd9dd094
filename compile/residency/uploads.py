"""Upload of a step's inputs to the GPU: one pinned buffer, one asynchronous copy.

The host fills one of two buffers while the copy out of the other may still be under way; a buffer is taken again only
when its copy of two steps ago is done, which it long is once that step's tokens were read.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGNMENT = 256  # of each tensor in bytes, as torch's allocator has it: libraries choose kernels by it
NUM_BUFFERS = 2
Layout = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Shape and dtype of tensors by name, laid out consecutively in one buffer."""


@dataclass
class _Buffer:
    """`done` is recorded behind the copy out of `host`."""

    host: Tensor
    done: torch.cuda.Event | torch.cpu.Event


@dataclass
class DeviceInputs:
    """Tensors that `upload` returns are valid until the next upload, on the stream of the call.

    Steps in a row mostly have tensors of the same shapes: their views are made once.
    """

    device: torch.device
    _buffers: list[_Buffer] = field(default_factory=list)
    _on_device: Tensor | None = None
    _turn: int = 0
    _layout: Layout = field(default_factory=dict)
    _views: dict[str, Tensor] = field(default_factory=dict)

    def upload(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The CPU tensors, by name, on the device."""
        layout = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        size = num_bytes(layout)
        buffer = self._next(size)
        at = buffer.host.data_ptr()
        for tensor in tensors.values():
            tensor = tensor.contiguous()
            ctypes.memmove(at, tensor.data_ptr(), tensor.nbytes)
            at += _padded(tensor.nbytes)
        self._on_device[:size].copy_(buffer.host[:size], non_blocking=True)
        buffer.done.record()
        if layout != self._layout:
            self._layout, self._views = layout, views(self._on_device, layout)
        return dict(self._views)

    def _next(self, size: int) -> _Buffer:
        if self._on_device is None or self._on_device.numel() < size:
            self._grow(2 * size)
        self._turn = (self._turn + 1) % NUM_BUFFERS
        buffer = self._buffers[self._turn]
        buffer.done.synchronize()
        return buffer

    def _grow(self, size: int) -> None:
        is_cuda, events = self.device.type == "cuda", torch.get_device_module(self.device)
        self._on_device, self._layout = torch.empty(size, dtype=torch.uint8, device=self.device), {}
        hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(NUM_BUFFERS)]
        self._buffers = [_Buffer(host, events.Event()) for host in hosts]


def num_bytes(layout: Layout) -> int:
    return sum(_padded(math.prod(shape) * dtype.itemsize) for shape, dtype in layout.values())


def views(memory: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors, in `memory` [bytes] uint8."""
    typed = {dtype: memory.view(dtype) for dtype in {dtype for _, dtype in layout.values()}}
    found, at = {}, 0
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape)
        first = at // dtype.itemsize
        flat = typed[dtype][first : first + size]
        found[name] = flat if len(shape) == 1 else flat.view(shape)
        at += _padded(size * dtype.itemsize)
    return found


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
