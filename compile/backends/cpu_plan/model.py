"""A compiled model on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fuseline.compile.backends.cpu_plan.plan import PlanExecutable
from fuseline.compile.backends.cpu_plan.steps import StepPlans
from fuseline.compile.backends.eager import EagerExecutable
from fuseline.compile.backends.inductor.upgrade import RegionUpgrade
from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.runner import PipelineResult
from fuseline.compile.graph_inputs import StepInputs, StepOutput, graph_values, no_embeds
from fuseline.compile.memory import Pages
from fuseline.compile.model_info import cache_tensors, copy_cache_blocks, copy_state_slots, describe, state_tensors

Executable = EagerExecutable | PlanExecutable | StepPlans


class CpuModel:
    """Runs steps on a CPU; the output of a step is valid until the next step."""

    def __init__(
        self,
        config: CompileConfig,
        captured: CapturedModel,
        result: PipelineResult,
        weights: Mapping[str, Tensor],
        executable: Executable,
    ) -> None:
        self.info = describe(config, captured, result, weights, executable)
        self.report = result
        self.verdict = captured.verdict
        """The model check's result in words; empty if it was skipped."""
        self._block_size = config.block_size
        self._keeps_rows = "keep_last_logits" not in config.disabled_passes
        self._no_embeds = no_embeds(self.info.embed_dim)
        self._executable = executable
        self._caches: dict[str, Tensor] = {}
        self._upgrade: RegionUpgrade | None = None

    @property
    def torch_ops(self) -> set[str]:
        """Names of the ops that have no kernel of ours."""
        return self._executable.torch_ops

    def compile_regions(self, upgrade: RegionUpgrade) -> None:
        """Starts the upgrade; steps use the compiled regions once it is done."""
        self._upgrade = upgrade
        weakref.finalize(self, upgrade.stop.set)
        upgrade.start()

    def wait_compiled(self) -> bool:
        """Waits for the upgrade. Returns whether the model now runs on compiled regions."""
        if self._upgrade is None:
            return False
        self._upgrade.join()
        return self._swap()

    def _swap(self) -> bool:
        """Switches plans, between steps only: the output of the last step is in the old plan's memory."""
        upgraded, self._upgrade = self._upgrade.result, None
        if upgraded is None:
            return False
        upgraded.bind(self._caches)
        self._executable = upgraded
        return True

    def allocate_caches(self, num_blocks: Sequence[int]) -> None:
        """Allocates `num_blocks` blocks per cache group."""
        self._allocate(cache_tensors(self.info, num_blocks, self._block_size))

    def allocate_states(self, num_slots: int) -> None:
        """Allocates recurrent states for so many sequences."""
        self._allocate(state_tensors(self.info, num_slots))

    def _allocate(self, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        pages = Pages()
        for name, (shape, dtype) in tensors.items():
            self._caches[name] = pages.zeros(shape, dtype)
        self._executable.bind(self._caches)

    def copy_blocks(self, pairs: Sequence[np.ndarray]) -> None:
        """Copies blocks of the caches before the next step, as `copy_cache_blocks` has them."""
        copy_cache_blocks(self._caches, self.info, pairs)

    def copy_states(self, pairs: np.ndarray) -> None:
        """Copies recurrent states before the next step, as `copy_state_slots` has them."""
        copy_state_slots(self._caches, self.info, pairs)

    def run(self, inputs: StepInputs) -> StepOutput:
        """Computes one step. Tokens named by `sources` must already be sampled: a CPU runs steps synchronously."""
        if self._upgrade is not None and not self._upgrade.is_alive():
            self._swap()
        if inputs.sources is not None:
            is_sampled = inputs.sources >= 0
            inputs.token_ids[is_sampled] = inputs.sampled[inputs.sources[is_sampled].long()]
        fields = self._no_embeds | inputs.fields()
        found = self._executable.run(graph_values(fields, self.info.rope_switch is not None))
        return StepOutput.of(found, None if self._keeps_rows else inputs.logits_rows)
