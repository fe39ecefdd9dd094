"""Model and device of an engine, named without importing them: the server's process has no use for torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fuseline.compile.config import Progress

if TYPE_CHECKING:
    from fuseline.engine.config import EngineConfig
    from fuseline.engine.run.device import Device
    from fuseline.engine.run.runner import Model

BuildModel = Callable[["EngineConfig", Progress], "Model"]
"""Must be importable by name: it is sent to the engine's process."""
FindDevice = Callable[["EngineConfig"], "Device"]
"""Likewise. Called before the model is built."""


def build_compiled_model(config: EngineConfig, progress: Progress) -> Model:
    """The checkpoint of the configuration, compiled for the device of the configuration."""
    from fuseline.compile.compiler import compile_model
    from fuseline.compile.target import detect_target
    from fuseline.engine.memory.sizing import check_override

    target = detect_target(config.compile.cpu_threads, config.device)
    return compile_model(config.compile, target, progress, config.graphs, partial(check_override, config))


def find_device(config: EngineConfig) -> Device:
    """The device of the configuration, with our kernels. Raises DeviceError."""
    from fuseline.compile.target import detect_target, keep_triton_kernels

    target = detect_target(config.compile.cpu_threads, config.device)
    if target.kind == "cuda":
        keep_triton_kernels(config.compile.cache_dir)
        from fuseline.engine.run.cuda_device import CudaDevice

        return CudaDevice(target)
    from fuseline.engine.run.device import HostDevice, native_ops

    return HostDevice(native_ops(), f"cpu ({target.isa}, {target.num_threads} threads)")
