"""A card that is none: tensors on the CPU, kernels interpreted, graphs run again where a card would replay them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import triton_interpreter
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fuseline.compile.backends.cuda_graph import Graph
from fuseline.compile.target import Target

__all__ = ["CARD", "FakeGraphs", "no_host_sync", "triton_interpreter"]
CARD = Target("cuda", "sm_90", 1, tensors="cpu")
READS = {"tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"}
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero", "bincount",
    "argwhere", "repeat_interleave",
}  # fmt: skip


class HostSync(AssertionError):
    """The host asked for what only the device knows."""


class FakeGraphs:
    """A graph that runs its ops again. `replays` counts by size, `fails` makes capture raise."""

    def __init__(self, fails: bool = False) -> None:
        self.replays: list[int] = []
        self.captured: list[int] = []
        self._fails = fails

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        run()

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        if self._fails:
            raise RuntimeError("out of memory")
        output = run()
        self.captured.append(output.shape[1])

        def replay() -> None:
            self.replays.append(output.shape[1])
            output.copy_(run())

        return Graph(replay, output)


class no_host_sync:
    """Raises HostSync where a card would be waited for: values of tensors read, or results whose size they decide.

    Tensors of `host` may be read.
    """

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        self._modes = (_Functions({t.data_ptr() for t in host}), _Ops())

    def __enter__(self) -> None:
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, host: set[int]) -> None:
        super().__init__()
        self._host = host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and args[0].data_ptr() not in self._host:
            raise HostSync(func.__name__)
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        is_masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or is_masked:
            raise HostSync(name)
        return func(*args, **(kwargs or {}))
