"""Upload of a step's inputs to the GPU: one pinned buffer, one asynchronous copy.

The host fills one of two buffers while the copy out of the other may still be under way; a buffer is taken again only
when its copy of two steps ago is done, which it long is once that step's tokens were read.
"""

from __future__ import annotations

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
    """Tensors that `upload` returns are valid until the next upload, on the stream of the call."""

    device: torch.device
    _buffers: list[_Buffer] = field(default_factory=list)
    _on_device: Tensor | None = None
    _turn: int = 0

    def upload(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The CPU tensors, by name, on the device."""
        layout = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        size = num_bytes(layout)
        buffer = self._next(size)
        for name, place in views(buffer.host, layout).items():
            place.copy_(tensors[name])
        self._on_device[:size].copy_(buffer.host[:size], non_blocking=True)
        buffer.done.record()
        return views(self._on_device, layout)

    def _next(self, size: int) -> _Buffer:
        if self._on_device is None or self._on_device.numel() < size:
            self._grow(2 * size)
        self._turn = (self._turn + 1) % NUM_BUFFERS
        buffer = self._buffers[self._turn]
        buffer.done.synchronize()
        return buffer

    def _grow(self, size: int) -> None:
        is_cuda, events = self.device.type == "cuda", torch.get_device_module(self.device)
        self._on_device = torch.empty(size, dtype=torch.uint8, device=self.device)
        hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(NUM_BUFFERS)]
        self._buffers = [_Buffer(host, events.Event()) for host in hosts]


def num_bytes(layout: Layout) -> int:
    return sum(_padded_bytes(*entry) for entry in layout.values())


def views(memory: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors, in `memory` [bytes] uint8."""
    found, at = {}, 0
    for name, (shape, dtype) in layout.items():
        found[name] = memory[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        at += _padded_bytes(shape, dtype)
    return found


def _padded_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
