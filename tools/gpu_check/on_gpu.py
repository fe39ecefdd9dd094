"""A pytest plugin that runs kernel tests on a GPU: it copies their CPU tensors there and the results back.

So every edge case of the tests also runs on the GPU, unchanged. A process whose kernel crashed gets nothing more from
the GPU: if tests are distributed over workers it exits, and a new worker takes over its remaining tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_emulator
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from triton.runtime import jit

from fuseline.compile.kernels.cuda.library import Overlap, library_for
from fuseline.compile.target import Target, detect_target
from gpu_check import failures
from gpu_check.table import is_gpu_lost


class Carried:
    """Copies whole storages, so that views keep their offsets, and tensors that share a storage still do."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._there: dict[int, tuple[Tensor, Tensor]] = {}

    def there(self, value: object) -> object:
        """The tensor on the GPU; any other value unchanged."""
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._there:
            here = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))
            self._there[storage.data_ptr()] = here, here.to(self._device, copy=True)
        moved = self._there[storage.data_ptr()][1].untyped_storage()
        return torch.empty(0, dtype=value.dtype, device=self._device).set_(
            moved, value.storage_offset(), value.shape, value.stride()
        )

    def back(self) -> None:
        for here, there in self._there.values():
            here.copy_(there)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", type=Path, help="folder of the lists of failed tests (failures.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs the tests that failed last time first, in the same order in every worker."""
    folder = config.getoption("--failures")
    if folder is not None:
        early = set(failures.before(folder))
        items.sort(key=lambda item: item.nodeid not in early)


class Recorder:
    """Records failures, in the process that workers report to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            failures.add(self._folder, report.nodeid)


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--failures")
    if folder is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(folder))
    carry_triton()
    library = library_for(Target("cuda", "", 1))
    if library is not None:
        cuda_emulator.ISA = detect_target(device="cuda").isa
        early = library.overlapping(Overlap.WEIGHTS)  # weights are copied synchronously, so early reads are safe
        cuda_emulator.run = lambda function, *args, **more: carry(function, early, *args, **more)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    result = yield
    if hasattr(item.config, "workerinput") and is_gpu_lost():
        os._exit(1)
    return result


def carry(function: Callable, library: object, *args: object, **more: object) -> object:
    """A function of compile/kernels/cuda with its tensors on the GPU; results on the CPU."""
    carried = Carried()
    found = function(library, *map(carried.there, args), **{key: carried.there(arg) for key, arg in more.items()})
    carried.back()
    return tree_map_only(Tensor, Tensor.cpu, found)


def carry_triton() -> None:
    launch = jit.JITFunction.run

    def run(self, *args, **kwargs):
        carried = Carried()
        found = launch(self, *map(carried.there, args), **{key: carried.there(arg) for key, arg in kwargs.items()})
        carried.back()
        return found

    jit.JITFunction.run = run
