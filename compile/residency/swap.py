"""KV caches on a GPU, and the blocks in pinned host memory that they are swapped to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fuseline.compile.graph_inputs import BlockCopy, cache_names
from fuseline.compile.kernels.triton.blocks import copy_blocks
from fuseline.compile.memory import host_pages
from fuseline.compile.residency.uploads import DeviceInputs
from fuseline.compile.specs import CacheGroup


class HostCaches:
    """`num_blocks` per cache group; a block of the host has the layout of the device's."""

    def __init__(
        self,
        caches: Mapping[str, Tensor],
        groups: Sequence[CacheGroup],
        num_blocks: Sequence[int],
        device: torch.device,
    ) -> None:
        self._caches = caches
        self._names = [cache_names(group, caches) for group in groups]
        self._uploads = DeviceInputs(device)
        pages = host_pages(device)
        self._host = {
            name: pages.zeros((count, *caches[name].shape[1:]), caches[name].dtype)
            for names, count in zip(self._names, num_blocks, strict=True)
            for name in names
        }
        # Compiles the kernels: the null block goes there and back.
        pairs = tuple(np.zeros((2, min(count, 1)), np.int64) for count in num_blocks)
        self.copy([BlockCopy(True, pairs), BlockCopy(False, pairs)])

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """On the current stream, in this order: one kernel for each cache of each copy. Waits for nothing."""
        todo = [
            (copy.is_out, names, pair)
            for copy in copies
            for names, pair in zip(self._names, copy.pairs, strict=True)
            if pair.size
        ]
        ids = self._uploads.upload(
            {
                f"{side} {number}": torch.from_numpy(blocks)
                for number, (_, _, pair) in enumerate(todo)
                for side, blocks in zip(("device", "host"), pair, strict=True)
            }
        )
        for number, (is_out, names, _) in enumerate(todo):
            device, host = ids[f"device {number}"], ids[f"host {number}"]
            for name in names:
                if is_out:
                    copy_blocks(self._host[name], self._caches[name], host, device)
                else:
                    copy_blocks(self._caches[name], self._host[name], device, host)
