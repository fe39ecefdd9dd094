"""Buffers of a model on the meta device whose values are known: its modules keep them in `fuseline_buffers`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def keep_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Registers buffers with these values, which `export` reads, in place of those that the module has kept so far."""
    module.fuseline_buffers = dict(values)
    for name, value in values.items():
        module.register_buffer(name, value.to("meta"), persistent=False)
