"""Models whose modeling file comes with their checkpoint (`auto_map` in config.json): built with their real buffers.

Transformers can fill the buffers of its own models that were built on the meta device. Code of others computes them
where it makes them, so its models are built on the CPU, with each parameter moved to the meta device as it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor, nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are built inside have no values: their memory is given back untouched."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        is_real = param is not None and param.device.type != "meta"
        register(module, name, nn.Parameter(param.to("meta"), param.requires_grad) if is_real else param)

    with patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


def move_buffers_to_meta(model: nn.Module) -> None:
    """Leaves the values of buffers, and of plain tensors that modules hold, in `fuseline_buffers` of their module."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, Tensor)]:
            value = vars(module).pop(name)
            module.register_buffer(name, value, persistent=False)
        real = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        if real:
            module.fuseline_buffers = real
            module._buffers.update({name: buffer.to("meta") for name, buffer in real.items()})
