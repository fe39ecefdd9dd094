"""A compiled model on a GPU: a step is one upload, then a replayed graph or the ops in turn; the host never waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fuseline.compile.backends.cuda.graph_api import CaptureStreams, CudaGraphApi, GraphApi
from fuseline.compile.backends.cuda.graphs import CapturedSteps, DecodeGraphs, DecodeInputs
from fuseline.compile.backends.cuda.piecewise import MixedGraphs, TokenInputs
from fuseline.compile.backends.cuda.whole_mixed import MixedInputs, WholeMixedGraphs
from fuseline.compile.config import GraphConfig, Progress, silent
from fuseline.compile.graph_inputs import (
    BlockCopy,
    GraphOutput,
    StepInputs,
    StepOutput,
    graph_values,
    no_embeds,
    only_decodes,
)
from fuseline.compile.kernels.triton.batch import feed_tokens
from fuseline.compile.model_info import cache_tensors, copy_cache_blocks, describe
from fuseline.compile.residency.sleep import Weights
from fuseline.compile.residency.swap import HostCaches
from fuseline.compile.residency.uploads import DeviceInputs


class CudaModel:
    """Runs steps on a GPU; the output of a step stays on the device and is valid until the next step."""

    def __init__(self, config, captured, result, weights, executable, device: str, graphs: GraphConfig) -> None:
        self.info = describe(config, captured, result, weights, executable)
        self.report = result
        self.verdict = captured.verdict
        self.graphs: CapturedSteps | None = None
        self._config = config
        self._executable = executable
        self._device = torch.device(device)
        self._graph_config = graphs
        self._keeps_rows = "keep_last_logits" not in config.disabled_passes
        has_scales = any(spec.has_scales for spec in self.info.cache_specs)
        self._is_uncalibrated = config.calculate_kv_scales and has_scales
        self._caches: dict[str, Tensor] = {}
        self._no_embeds = no_embeds(self.info.embed_dim, device)
        self._host_caches: HostCaches | None = None
        self._uploads = DeviceInputs(self._device)
        self._capture_streams = CaptureStreams.of(self._device) if self._device.type == "cuda" else None
        loaded = (tensor for name, tensor in weights.items() if name not in result.constants)
        self._weights = Weights(loaded, self._device)

    def allocate_caches(self, num_blocks: Sequence[int]) -> None:
        """Allocates `num_blocks` blocks per cache group. Drops graphs captured with earlier caches."""
        self.stop_capture()
        for name, (shape, dtype) in cache_tensors(self.info, num_blocks, self._config.block_size).items():
            self._caches[name] = torch.zeros(shape, dtype=dtype, device=self._device)

    def allocate_host_blocks(self, num_blocks: Sequence[int]) -> None:
        """Allocates host blocks per cache group for swapping; call allocate_caches first."""
        self._host_caches = None  # frees its memory first
        self._host_caches = HostCaches(self._caches, self.info.cache_groups, num_blocks, self._device)

    def swap(self, copies: Sequence[BlockCopy]) -> None:
        """Copies blocks in the given order, before the next step. Never waits for the device."""
        self._host_caches.copy(copies)

    def copy_blocks(self, pairs: Sequence[np.ndarray]) -> None:
        """Copies blocks of the caches before the next step, as `copy_cache_blocks` has them."""
        copy_cache_blocks(self._caches, self.info, pairs)

    def move_weights_to_host(self) -> None:
        """Moves weights to host memory and drops graphs; no step can run until move_weights_back."""
        self.stop_capture()
        self._weights.to_host()

    def move_weights_back(self) -> None:
        self._weights.to_device()

    def discard_weights(self) -> None:
        """Frees the weights permanently; no step can run afterwards."""
        self.stop_capture()
        self._weights.discard()

    def capture_graphs(self, progress: Progress = silent, api: GraphApi | None = None) -> None:
        """Starts capturing graphs in the background; call allocate_caches first.

        Raises ValueError for splitting ops that the model does not contain.
        """
        self.stop_capture()
        api = api or (CudaGraphApi(self._capture_streams) if self._capture_streams else None)
        config, caches = self._graph_config, self._caches | self._no_embeds
        if api is None or not config.enabled:
            return
        sizes = config.resolved(self._config.max_num_seqs)
        longest, most = min(self.info.max_model_len, config.max_seq_len), self._config.max_num_batched_tokens
        width = -(-longest // self._config.block_size)
        groups = len(self.info.cache_groups), self.info.rope_switch is not None, str(self._device)
        decode = DecodeGraphs(self._executable, caches, sizes, lambda size: DecodeInputs(size, width, *groups), api)
        num_seqs = self._config.max_num_seqs
        whole = WholeMixedGraphs(
            self._executable, caches, config.resolved_whole_mixed(most),
            lambda size: MixedInputs(size, num_seqs, width, *groups), api,
        )  # fmt: skip
        mixed = MixedGraphs(
            self._executable, caches, config.resolved_mixed(most), config.splitting_ops,
            lambda size: TokenInputs(size, *groups), self._config.block_size, api,
        )  # fmt: skip
        self.graphs = CapturedSteps(decode, whole, mixed, config.num_warmups)
        self.graphs.start(progress)

    def stop_capture(self) -> None:
        """Drops all graphs and returns their pool to torch's allocator. Steps run op by op until capture_graphs is
        called again, which is required after weights or caches move. Logits of the last step become invalid.
        """
        if self.graphs is not None:
            self.graphs.stop()
            self.graphs = None

    def run(self, inputs: StepInputs) -> StepOutput:
        """Launches one step and never waits for the device.

        Tokens named by `sources` are read from `sampled`, which the previous step may still be computing.
        """
        fields = inputs.fields()
        step = self._uploads.upload(fields if inputs.sources is None else {**fields, "sources": inputs.sources})
        if inputs.sources is not None:
            feed_tokens(step["token_ids"], step.pop("sources"), inputs.sampled)
        if self._executable.has_prepared:
            self._executable.prepare(self._values(fields))
        if self._is_uncalibrated and (inputs.slot_mapping.numpy() >= 0).any():
            # The first step that writes keys to a cache; a warm-up's keys are meaningless.
            self._is_uncalibrated = False
            return self._wanted(self._executable.calibrate(self._caches | self._values(step)), step)
        found = None if inputs.embeds is not None else self._replayed(only_decodes(fields), step)
        if found is None:
            found = self._executable.run(self._caches | self._values(step))
        return self._wanted(found, step)

    def _wanted(self, found: GraphOutput, step: Mapping[str, Tensor]) -> StepOutput:
        return StepOutput.of(found, None if self._keeps_rows else step["logits_rows"])

    def _replayed(self, is_decode: bool, step: Mapping[str, Tensor]) -> GraphOutput | None:
        """Results of a graph replay; None if no graph fits the step. Graphs are captured without embeddings."""
        if self.graphs is None:
            return None
        found = self.graphs.decode.run(step) if is_decode else None
        found = self.graphs.whole_mixed.run(step) if found is None else found
        return self.graphs.mixed.run(step, self._values(step)) if found is None else found

    def _values(self, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return graph_values(self._no_embeds | step, self.info.rope_switch is not None)
