"""A sleeping model's weights: in pinned host memory, or nowhere. The tensors stay, only their memory goes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fuseline.compile.memory import host_pages
from fuseline.compile.residency.uploads import num_bytes, views


class Weights:
    """Tensors that own resizable memory of the device. What has captured their addresses is void once they move."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._storages = list({t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values())
        self._layout = {str(k): ((storage.nbytes(),), torch.uint8) for k, storage in enumerate(self._storages)}
        self._device = device
        self._host: Tensor | None = None

    def to_host(self) -> None:
        self._host = host_pages(self._device).zeros((num_bytes(self._layout),), torch.uint8)
        for part, whole in self._pairs():
            part.copy_(whole, non_blocking=True)
        self._free()

    def to_device(self) -> None:
        for storage, ((size,), _) in zip(self._storages, self._layout.values(), strict=True):
            storage.resize_(size)
        for part, whole in self._pairs():
            whole.copy_(part, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._host = None

    def discard(self) -> None:
        """For good, wherever they are."""
        self._host = None
        self._free()

    def _free(self) -> None:
        """Gives the device's memory back to its driver. Waits until nothing uses it any more."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for storage in self._storages:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Bytes on the host and on the device."""
        wholes = (torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage) for storage in self._storages)
        return zip(views(self._host, self._layout).values(), wholes, strict=True)
