"""compile_model(): from a checkpoint directory to something that runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fuseline import _C
from fuseline.compile.backends.artifact import load_optimized, load_or_capture, save_optimized
from fuseline.compile.backends.cuda import CudaExecutable
from fuseline.compile.backends.eager import EagerExecutable, constant_name
from fuseline.compile.backends.offload import Offload, choose_offloaded, without_offloaded
from fuseline.compile.backends.plan import PlanExecutable
from fuseline.compile.backends.steps import StepPlans, lower
from fuseline.compile.backends.tune import TUNE_LEVEL, tune_linears
from fuseline.compile.backends.tune_card import tune_kernels
from fuseline.compile.backends.upgrade import RegionUpgrade
from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.capture.kv_scales import stored_scales
from fuseline.compile.capture.sinks import DeviceSink, HostSink, Sink
from fuseline.compile.capture.weights import WeightFinder, load_weights
from fuseline.compile.check import check_model
from fuseline.compile.config import PASSES, CompileConfig, GraphConfig
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.graph.runner import PipelineResult, Stages, run_passes
from fuseline.compile.graph_inputs import GraphInputs
from fuseline.compile.memory import Pages
from fuseline.compile.model_info import describe, model_limit
from fuseline.compile.passes.pipeline import stages
from fuseline.compile.specs import CacheSpec, WeightSource
from fuseline.compile.target import CPU, Target

if TYPE_CHECKING:
    from fuseline.compile.cuda_model import CudaModel

GIB = 1 << 30
Progress = Callable[[str, int, int], None]
Executable = EagerExecutable | PlanExecutable | StepPlans | CudaExecutable


def compile_model(
    config: CompileConfig, target: Target, progress: Progress | None = None, graphs: GraphConfig | None = None
) -> CompiledModel | CudaModel:
    """Raises CaptureError or LoadError, one line each. `graphs` are those that a card captures."""
    report_progress = progress or (lambda phase, done, total: None)
    _C.set_num_threads(target.num_threads)
    torch.set_num_threads(target.num_threads)
    report_progress("capturing", 0, 1)
    captured, result = load_optimized(config, target) or optimize(config, target, keep=True, progress=report_progress)
    report_progress("capturing", 1, 1)
    requests = weight_requests(captured.graph, captured, result)
    offload = _offload(captured.graph, config, target)
    weights = load_weights(requests, captured, config, report_progress, _sink(target, offload))
    weights |= on_device(result.constants | _kv_scales(result, config), target)
    if config.level >= TUNE_LEVEL:
        _tune(captured.graph, _by_target(captured.graph, weights), config, target, report_progress)
    executable = _executable(captured.graph, weights, config, target, offload)
    if isinstance(executable, CudaExecutable):
        weights = without_offloaded(weights, offload)
        return _on_card(config, captured, result, weights, executable, target, graphs)
    model = CompiledModel(config, captured, result, weights, executable)
    if config.level > 1 and executable.num_regions and "cut_regions" not in config.disabled_passes:
        model.compile_regions(RegionUpgrade(captured.graph, _by_target(captured.graph, weights), config))
        if config.wait_compiled:
            report_progress("compiling", 0, 1)
            model.wait_compiled()
            report_progress("compiling", 1, 1)
    return model


def _tune(graph: fx.GraphModule, weights: Mapping[str, Tensor], config, target: Target, progress: Progress) -> None:
    if target.kind == "cuda":
        tune_kernels(graph, weights, config, target, progress)
    else:
        tune_linears(graph, weights, config, progress)


def _on_card(config, captured, result, weights, executable, target: Target, graphs: GraphConfig | None) -> CudaModel:
    from fuseline.compile.cuda_model import CudaModel  # needs triton

    return CudaModel(config, captured, result, weights, executable, target.device, graphs or GraphConfig())


def optimize(
    config: CompileConfig, target: Target = CPU, keep: bool = False, progress: Progress | None = None
) -> tuple[CapturedModel, PipelineResult]:  # fmt: skip
    """The captured graph, checked, after all passes of the level; no weights are read. Raises CaptureError.

    `keep`: for the next start, which then runs no pass.
    """
    captured = load_or_capture(config, None if config.skip_model_check else partial(_check, config, progress))
    result = _run_passes(captured, config, target)
    if keep:
        save_optimized(config, target, captured, result)
    return captured, result


def _check(config: CompileConfig, progress: Progress | None, captured: CapturedModel) -> str:
    """The verdict on a model. Raises CaptureError."""
    if progress:
        progress("checking", 0, 1)
    verdict = check_model(config, captured, build_on_cpu)
    if progress:
        progress("checking", 1, 1)
    return verdict


def build_on_cpu(captured: CapturedModel, config: CompileConfig, weights: WeightFinder) -> CompiledModel:
    """A captured model with those weights, after all passes, on the CPU; nothing is cached."""
    result = _run_passes(captured, config, CPU)
    loaded = load_weights(weight_requests(captured.graph, captured, result), captured, config, weights=weights)
    loaded |= result.constants
    return CompiledModel(config, captured, result, loaded, _executable(captured.graph, loaded, config, CPU))


def _run_passes(captured: CapturedModel, config: CompileConfig, target: Target) -> PipelineResult:
    limit, switch = model_limit(config, captured.facts), captured.rope_switch
    rope_rows = 2 * switch.table_rows if switch else limit
    ctx = PassContext(_with_passes_of(config, target), captured.facts, limit, rope_rows, captured.constants, target)
    return run_passes(captured.graph, _stages(config, target), ctx)


def _with_passes_of(config: CompileConfig, target: Target) -> CompileConfig:
    """Without the disabled passes that the level has not anyway. Raises ValueError for one that no level has."""
    if unknown := sorted(set(config.disabled_passes) - set(PASSES)):
        raise ValueError(f"there is no pass {unknown[0]!r}; passes: {', '.join(sorted(PASSES))}")
    present = {graph_pass.__name__ for _, passes in _stages(config, target) for graph_pass in passes}
    return replace(config, disabled_passes=tuple(name for name in config.disabled_passes if name in present))


def _stages(config: CompileConfig, target: Target) -> Stages:
    return stages(config.level, target.kind, config.batch_invariant)


def on_device(constants: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """The constants where the target computes; what is one tensor stays one."""
    moved = {id(tensor): tensor.to(target.device) for tensor in constants.values()}
    return {name: moved[id(tensor)] for name, tensor in constants.items()}


def _kv_scales(result: PipelineResult, config: CompileConfig) -> dict[str, Tensor]:
    """Of fp8 caches, as the checkpoint has them, unless they are to be computed."""
    layers = [spec.layer for spec in result.specs if isinstance(spec, CacheSpec) and spec.has_scales]
    return stored_scales(config, layers) if layers and not config.calculate_kv_scales else {}


def _offload(graph: fx.GraphModule, config: CompileConfig, target: Target) -> Offload | None:
    """The weights of a card's model that stay on the host; on a CPU they all are there."""
    wanted = int(config.cpu_offload_gb * GIB) if target.kind == "cuda" else 0
    layers = choose_offloaded(graph, wanted)
    return Offload(layers, torch.device(target.device)) if layers else None


def _sink(target: Target, offload: Offload | None) -> Sink:
    if target.kind == "cpu":
        return HostSink()
    return DeviceSink(torch.device(target.device), offload.host_tensors() if offload else None)


def _executable(
    graph: fx.GraphModule,
    weights: Mapping[str, Tensor],
    config: CompileConfig,
    target: Target,
    offload: Offload | None = None,
) -> Executable:
    if target.kind == "cuda":
        return CudaExecutable(graph, _by_target(graph, weights), target, offload=offload)
    if config.level == 0:
        return EagerExecutable(graph, weights)
    return lower(graph, _by_target(graph, weights), config)


def _by_target(graph: fx.GraphModule, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {str(n.target): weights[constant_name(n)] for n in graph.graph.nodes if n.op == "get_attr"}


def weight_requests(graph: fx.GraphModule, captured: CapturedModel, result: PipelineResult) -> dict[str, WeightSource]:
    """What must be loaded, by constant name."""
    return {
        constant_name(node): node.meta.get("weight") or WeightSource((node.meta["fqn"],))
        for node in graph.graph.nodes
        if node.op == "get_attr" and constant_name(node) not in result.constants
    }


class CompiledModel:
    """A model ready to run steps. Logits are valid until the next run."""

    def __init__(self, config, captured, result, weights, executable) -> None:
        self.info = describe(config, captured, result, weights, executable)
        self.report = result
        self.verdict = captured.verdict
        self._block_size = config.block_size
        self._keeps_rows = "keep_last_logits" not in config.disabled_passes
        self._executable = executable
        self._caches: dict[str, Tensor] = {}
        self._upgrade: RegionUpgrade | None = None

    def compile_regions(self, upgrade: RegionUpgrade) -> None:
        """From the step after it is done on, the model runs on compiled regions."""
        self._upgrade = upgrade
        weakref.finalize(self, upgrade.stop.set)
        upgrade.start()

    def wait_compiled(self) -> bool:
        """Waits for the regions; whether the model now runs on compiled ones."""
        if self._upgrade is None:
            return False
        self._upgrade.join()
        return self._swap()

    def _swap(self) -> bool:
        """Between steps only: the logits of the last step lie in the old plan's memory."""
        upgraded, self._upgrade = self._upgrade.result, None
        if upgraded is None:
            return False
        upgraded.bind(self._caches)
        self._executable = upgraded
        return True

    def allocate_caches(self, num_blocks: Sequence[int]) -> None:
        """Blocks per cache group."""
        of_layer = {
            layer: n for group, n in zip(self.info.cache_groups, num_blocks, strict=True) for layer in group.layers
        }
        pages = Pages()
        for spec in self.info.cache_specs:
            for name, dim in (("k", spec.key_dim), ("v", spec.value_dim)):
                shape = (of_layer[spec.layer], spec.num_kv_heads, self._block_size, dim)
                self._caches[f"{name}_cache_{spec.layer}"] = pages.zeros(shape, getattr(torch, spec.dtype))
        self._executable.bind(self._caches)

    def run(self, inputs: GraphInputs) -> Tensor:
        """Logits [R, V] float32 of the wanted rows."""
        if self._upgrade is not None and not self._upgrade.is_alive():
            self._swap()
        values = input_values(inputs)
        if self.info.rope_switch:
            values["positions"] = inputs.rope_rows[None]
        logits = self._executable.run(values).float()[0]
        return logits if self._keeps_rows else logits[inputs.logits_rows]


def input_values(inputs: GraphInputs) -> dict[str, Tensor]:
    """Graph inputs by placeholder name."""
    values = {
        "token_ids": inputs.token_ids[None],
        "positions": inputs.positions[None],
        "rope_rows": inputs.rope_rows,
        "query_start": inputs.query_start,
        "seq_lens": inputs.seq_lens,
        "logits_rows": inputs.logits_rows,
    }
    for group in range(inputs.slot_mapping.shape[0]):
        values[f"slots_{group}"] = inputs.slot_mapping[group]
        values[f"block_table_{group}"] = inputs.block_tables[group]
    return values
