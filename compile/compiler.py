"""compile_model(): compiles a checkpoint directory to an executable model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fuseline import _C
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.backends.cpu_plan.model import Executable as CpuExecutable
from fuseline.compile.backends.cpu_plan.steps import lower
from fuseline.compile.backends.cuda.executable import CudaExecutable
from fuseline.compile.backends.eager import EagerExecutable
from fuseline.compile.backends.inductor.upgrade import RegionUpgrade
from fuseline.compile.capture.artifact import load_optimized, load_or_capture, save_optimized
from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.capture.errors import CaptureError, LoadError, told_as
from fuseline.compile.capture.kv_scales import stored_scales
from fuseline.compile.capture.layouts import layouts_of, with_plain_inputs
from fuseline.compile.capture.sinks import DeviceSink, HostSink, Sink
from fuseline.compile.capture.weights import WeightFinder, load_weights
from fuseline.compile.check import check_model
from fuseline.compile.config import PASSES, STORED, CompileConfig, GraphConfig, Progress, silent
from fuseline.compile.graph.edit import source_of
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.graph.runner import PipelineResult, run_passes
from fuseline.compile.model_info import model_limit
from fuseline.compile.passes.pipeline import stages
from fuseline.compile.quantization.methods import quantizes_plain
from fuseline.compile.residency.offload import Offload, choose_offloaded, without_offloaded
from fuseline.compile.specs import CacheGroup, CacheSpec, WeightSource
from fuseline.compile.target import CPU, Target
from fuseline.compile.tuning.kernels import tune_kernels
from fuseline.compile.tuning.linears import TUNE_LEVEL, tune_linears
from fuseline.compile.tuning.runs import tune_runs

if TYPE_CHECKING:
    from fuseline.compile.backends.cuda.model import CudaModel

GIB = 1 << 30
Admit = Callable[[Sequence[CacheGroup], int], None]
Executable = CpuExecutable | CudaExecutable


def admit_all(groups: Sequence[CacheGroup], max_model_len: int) -> None:
    """An `admit` that refuses no model."""


def compile_model(
    config: CompileConfig,
    target: Target,
    progress: Progress = silent,
    graphs: GraphConfig | None = None,
    admit: Admit = admit_all,
) -> CpuModel | CudaModel:
    """Raises CaptureError or LoadError, one line each, and what `admit` raises. `graphs` selects the steps that a GPU
    captures; `admit` is told the model's cache groups and context length before any weight is loaded.
    """
    config = _with_dtype_of(config, target)
    _C.set_num_threads(target.num_threads)
    torch.set_num_threads(target.num_threads)
    progress("capturing", 0, 1)
    captured, result = load_optimized(config, target) or optimize(config, target, keep=True, progress=progress)
    progress("capturing", 1, 1)
    groups = [spec for spec in result.specs if isinstance(spec, CacheGroup)]
    admit(groups, model_limit(config, captured.facts))
    requests = weight_requests(captured.graph, result)
    offload = _offload(captured.graph, config, target)
    with told_as(LoadError, f"the weights of {config.model} cannot be loaded"):
        weights = load_weights(requests, captured, config, progress, _sink(target, offload))
    weights |= on_device(result.constants | _kv_scales(result, config), target)
    if config.level >= TUNE_LEVEL and target.kind == "cuda":
        tune_kernels(captured.graph, weights, config, target, progress)
        tune_runs(captured.graph, weights, config, target, progress)
    elif config.level >= TUNE_LEVEL:
        tune_linears(captured.graph, weights, config, progress)
    executable = _executable(captured.graph, weights, config, target, offload)
    if isinstance(executable, CudaExecutable):
        from fuseline.compile.backends.cuda.model import CudaModel  # needs triton

        weights = without_offloaded(weights, offload)
        return CudaModel(config, captured, result, weights, executable, target.device, graphs or GraphConfig())
    model = CpuModel(config, captured, result, weights, executable)
    if config.level > 1 and executable.num_regions and "cut_regions" not in config.disabled_passes:
        model.compile_regions(RegionUpgrade(captured.graph, weights, config))
        if config.wait_compiled:
            progress("compiling", 0, 1)
            model.wait_compiled()
            progress("compiling", 1, 1)
    return model


def optimize(
    config: CompileConfig, target: Target = CPU, keep: bool = False, progress: Progress = silent
) -> tuple[CapturedModel, PipelineResult]:  # fmt: skip
    """Returns the captured graph, checked, after all passes of the level; reads no weights. Raises CaptureError.

    `keep`: store the result for the next start, which then runs no pass.
    """
    config = _with_dtype_of(config, target)
    captured = load_or_capture(config, None if config.skip_model_check else partial(_check, config, progress))
    result = _run_passes(captured, config, target, _layouts(captured, config, target))
    if keep:
        save_optimized(config, target, captured, result)
    return captured, result


def _layouts(captured: CapturedModel, config: CompileConfig, target: Target) -> Mapping[str, str]:
    """Layouts of quantized weights, by parameter. Raises CaptureError, LoadError."""
    packs = config.level > 0 and "pack_weights" not in config.disabled_passes
    if quantizes_plain(config) and not packs:
        raise CaptureError(
            f"--quantization {config.quantization} quantizes plain weights from -O1 on only, with the pass "
            "pack_weights; leave it out"
        )
    needed = {"int8": "cpu", "fp8": "cuda"}.get(config.activation_dtype, target.kind)
    if config.activation_dtype != "auto" and (target.kind != needed or not packs):
        device = {"cpu": "CPU", "cuda": "GPU"}[needed]
        raise CaptureError(f"--activation-dtype {config.activation_dtype} is for a {device}, from -O1 on and with the "
                           "pass pack_weights; leave it out")  # fmt: skip
    found = layouts_of(captured, config) if packs else {}
    return found if target.kind == "cpu" else {name: with_plain_inputs(layout) for name, layout in found.items()}


def _with_dtype_of(config: CompileConfig, target: Target) -> CompileConfig:
    """Keeps fp16 on a GPU, which computes it as fast as bf16."""
    return replace(config, dtype=STORED) if config.dtype == "auto" and target.kind == "cuda" else config


def _check(config: CompileConfig, progress: Progress, captured: CapturedModel) -> str:
    """Returns the verdict on a model. Raises CaptureError."""
    progress("checking", 0, 1)
    verdict = check_model(config, captured, build_on_cpu)
    progress("checking", 1, 1)
    return verdict


def build_on_cpu(captured: CapturedModel, config: CompileConfig, weights: WeightFinder) -> CpuModel:
    """Compiles a captured model with those weights for the CPU; nothing is cached."""
    result = _run_passes(captured, config, CPU)
    loaded = load_weights(weight_requests(captured.graph, result), captured, config, weights=weights)
    loaded |= result.constants
    return CpuModel(config, captured, result, loaded, _executable(captured.graph, loaded, config, CPU))


def _run_passes(
    captured: CapturedModel, config: CompileConfig, target: Target, layouts: Mapping[str, str] = MappingProxyType({})
) -> PipelineResult:  # fmt: skip
    limit, switch = model_limit(config, captured.facts), captured.rope_switch
    rope_rows = 2 * switch.table_rows if switch else limit
    ctx = PassContext(
        _with_passes_of(config, target), captured.facts, limit, rope_rows, captured.constants, target, layouts
    )
    return run_passes(captured.graph, stages(config, target.kind), ctx)


def _with_passes_of(config: CompileConfig, target: Target) -> CompileConfig:
    """Drops disabled passes that the level does not have. Raises ValueError for settings without an effect."""
    if unknown := sorted(set(config.disabled_passes) - set(PASSES)):
        raise ValueError(f"there is no pass {unknown[0]!r}; passes: {', '.join(sorted(PASSES))}")
    present = {graph_pass.__name__ for _, passes in stages(config, target.kind) for graph_pass in passes}
    if config.weight_format and "pack_weights" not in present - set(config.disabled_passes):
        raise ValueError(f"weight_format {config.weight_format} has no effect without the pass pack_weights")
    return replace(config, disabled_passes=tuple(name for name in config.disabled_passes if name in present))


def on_device(constants: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """Moves the constants to the target's device; shared tensors stay shared."""
    moved = {id(tensor): tensor.to(target.device) for tensor in constants.values()}
    return {name: moved[id(tensor)] for name, tensor in constants.items()}


def _kv_scales(result: PipelineResult, config: CompileConfig) -> dict[str, Tensor]:
    """The checkpoint's scales of fp8 caches, unless they are to be computed."""
    layers = [spec.layer for spec in result.specs if isinstance(spec, CacheSpec) and spec.has_scales]
    return stored_scales(config, layers) if layers and not config.calculate_kv_scales else {}


def _offload(graph: fx.GraphModule, config: CompileConfig, target: Target) -> Offload | None:
    """Selects the weights of a GPU's model that stay on the host; None on a CPU."""
    wanted = int(config.cpu_offload_gb * GIB) if target.kind == "cuda" else 0
    layers = choose_offloaded(graph, wanted)
    return Offload(layers, torch.device(target.device)) if layers else None


def _sink(target: Target, offload: Offload | None) -> Sink:
    if target.kind == "cpu":
        return HostSink()
    return DeviceSink(torch.device(target.device), offload.host_tensors() if offload else None)


def _executable(
    graph: fx.GraphModule, weights: Mapping[str, Tensor], config: CompileConfig, target: Target,
    offload: Offload | None = None,
) -> Executable:  # fmt: skip
    """`weights` by get_attr target."""
    if target.kind == "cuda":
        return CudaExecutable(graph, weights, target, offload=offload)
    with told_as(CaptureError, "its graph cannot be lowered"):
        return EagerExecutable(graph, weights) if config.level == 0 else lower(graph, weights, config)


def weight_requests(graph: fx.GraphModule, result: PipelineResult) -> dict[str, WeightSource]:
    """The weights to load, by get_attr target; passes name the constants that they compute so."""
    nodes = graph.graph.find_nodes(op="get_attr")
    return {str(node.target): source_of(node) for node in nodes if node.target not in result.constants}
