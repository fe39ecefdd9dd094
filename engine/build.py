"""What an engine is built from, named without importing it: the server's process has no use for torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuseline.engine.config import EngineConfig
    from fuseline.engine.run.runner import Model
    from fuseline.engine.run.sampler import SampleOps

ProgressFn = Callable[[str, int, int], None]
BuildModel = Callable[["EngineConfig", ProgressFn], "Model"]
"""Must be importable by name: it is sent to the engine's process."""
BuildOps = Callable[[], "SampleOps"]


def build_compiled_model(config: EngineConfig, progress: ProgressFn) -> Model:
    """The checkpoint of the configuration, compiled for this machine."""
    from fuseline.compile.compiler import compile_model
    from fuseline.compile.target import detect_target

    return compile_model(config.compile, detect_target(config.compile.cpu_threads), progress)


def build_native_ops() -> SampleOps:
    """Sampling by our kernels."""
    from fuseline.engine.run.sampler import native_ops

    return native_ops()
