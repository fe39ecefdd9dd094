"""A compiled model on a card: a step is one upload, then a replayed graph or the ops in turn; nothing is waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fuseline.compile.backends.cuda.graph_api import CaptureStreams, CudaGraphApi, GraphApi
from fuseline.compile.backends.cuda.graphs import CapturedSteps, DecodeGraphs, Inputs, Progress
from fuseline.compile.backends.cuda.piecewise import MixedGraphs, TokenInputs
from fuseline.compile.config import GraphConfig
from fuseline.compile.graph_inputs import BlockCopy, GraphInputs
from fuseline.compile.kernels.triton.batch import feed_tokens
from fuseline.compile.model_info import describe
from fuseline.compile.residency.sleep import Weights
from fuseline.compile.residency.swap import HostCaches
from fuseline.compile.residency.uploads import DeviceInputs


class CudaModel:
    """The counterpart of CompiledModel; logits are on the device, valid until the next run.

    `api` captures graphs: torch.cuda's on a card. Without one (kernels interpreted) none are captured.
    """

    def __init__(self, config, captured, result, weights, executable, device: str, graphs: GraphConfig) -> None:
        self.info = describe(config, captured, result, weights, executable)
        self.report = result
        self.graphs: CapturedSteps | None = None
        self._config = config
        self._executable = executable
        self._device = torch.device(device)
        self._graph_config = graphs
        self._keeps_rows = "keep_last_logits" not in config.disabled_passes
        has_scales = any(spec.has_scales for spec in self.info.cache_specs)
        self._is_uncalibrated = config.calculate_kv_scales and has_scales
        self._caches: dict[str, Tensor] = {}
        self._host_caches: HostCaches | None = None
        self._uploads = DeviceInputs(self._device)
        self._capture_streams = CaptureStreams.of(self._device) if self._device.type == "cuda" else None
        loaded = (tensor for name, tensor in weights.items() if name not in result.constants)
        self._weights = Weights(loaded, self._device)

    def allocate_caches(self, num_blocks: Sequence[int]) -> None:
        """Blocks per cache group. Graphs of other caches are given up."""
        self.stop_capture()
        of_layer = {
            layer: n for group, n in zip(self.info.cache_groups, num_blocks, strict=True) for layer in group.layers
        }
        for spec in self.info.cache_specs:
            for name, dim in (("k", spec.key_dim), ("v", spec.value_dim)):
                shape = (of_layer[spec.layer], spec.num_kv_heads, self._config.block_size, dim)
                cache = torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=self._device)
                self._caches[f"{name}_cache_{spec.layer}"] = cache

    def allocate_host_blocks(self, num_blocks: Sequence[int]) -> None:
        """Blocks per cache group to swap to; allocate_caches comes first."""
        self._host_caches = None  # gives its memory back first
        self._host_caches = HostCaches(self._caches, self.info.cache_groups, num_blocks, self._device)

    def swap(self, copies: Sequence[BlockCopy]) -> None:
        """Copies blocks in this order, before what is run next. Never waits for the device."""
        self._host_caches.copy(copies)

    def move_weights_to_host(self) -> None:
        """Until move_weights_back nothing can be run. Graphs are given up."""
        self.stop_capture()
        self._weights.to_host()

    def move_weights_back(self) -> None:
        self._weights.to_device()

    def discard_weights(self) -> None:
        """For good: the model cannot be run any more."""
        self.stop_capture()
        self._weights.discard()

    def capture_graphs(self, progress: Progress | None = None, api: GraphApi | None = None) -> None:
        """Starts to capture steps as graphs, in the background; allocate_caches comes first.

        Raises ValueError for splitting ops that the model has not.
        """
        self.stop_capture()
        api = api or (CudaGraphApi(self._capture_streams) if self._capture_streams else None)
        config, caches = self._graph_config, self._caches
        if api is None or not config.enabled:
            return
        sizes = config.resolved(self._config.max_num_seqs)
        decode = DecodeGraphs(self._executable, caches, sizes, self._decode_inputs, api)
        sizes = config.resolved_mixed(self._config.max_num_batched_tokens)
        mixed = MixedGraphs(
            self._executable, caches, sizes, config.splitting_ops, self._token_inputs, self._config.block_size, api
        )
        self.graphs = CapturedSteps(decode, mixed, config.num_warmups)
        self.graphs.start(progress or (lambda phase, done, total: None))

    def stop_capture(self) -> None:
        """Drops all graphs and what they hold: their pool goes back to torch's allocator. Steps run op by op until
        capture_graphs is called again, which has to be after weights or caches have moved. Logits of the last step are
        not to be read any more.
        """
        if self.graphs is not None:
            self.graphs.stop()
            self.graphs = None

    def run(self, inputs: GraphInputs, sources: Tensor | None = None, sampled: Tensor | None = None) -> Tensor:
        """Logits [R, V] float32 of the wanted rows. Never waits for the device.

        `sources` [T] int32 on the host: where it is not negative, the step's token is sampled[sources[t]], a tensor
        [rows] int64 on the device that the step before wrote; token_ids has anything there.
        """
        tensors = dict(vars(inputs)) if sources is None else {**vars(inputs), "sources": sources}
        step = self._uploads.upload(tensors)
        if sources is not None:
            feed_tokens(step["token_ids"], step["sources"], sampled)
        if self._executable.has_prepared:
            self._executable.prepare(self._values(vars(inputs)))
        if self._is_uncalibrated and (inputs.slot_mapping.numpy() >= 0).any():
            # The first step whose keys are kept; those of a warm-up say nothing.
            self._is_uncalibrated = False
            return self._wanted(self._executable.calibrate(self._caches | self._values(step)), step)
        logits = self._replayed(inputs, step)
        if logits is None:
            logits = self._executable.run(self._caches | self._values(step))
        return self._wanted(logits, step)

    def _wanted(self, logits: Tensor, step: dict[str, Tensor]) -> Tensor:
        """Logits [R, V] of the wanted rows."""
        return logits[0] if self._keeps_rows else logits[0].index_select(0, step["logits_rows"])

    def _replayed(self, inputs: GraphInputs, step: dict[str, Tensor]) -> Tensor | None:
        """Logits [1, R, V] by graphs; None if none fits the step."""
        if self.graphs is None:
            return None
        logits = self.graphs.decode.run(step, inputs.block_tables.shape[2]) if _is_decode(inputs) else None
        return self.graphs.mixed.run(step, self._values(step)) if logits is None else logits

    def _values(self, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Graph inputs by placeholder name."""
        positions = step["rope_rows" if self.info.rope_switch else "positions"]
        values = {name: step[name] for name in ("rope_rows", "query_start", "seq_lens", "logits_rows")}
        values |= {"token_ids": step["token_ids"][None], "positions": positions[None]}
        for group in range(step["slot_mapping"].shape[0]):
            values[f"slots_{group}"] = step["slot_mapping"][group]
            values[f"block_table_{group}"] = step["block_tables"][group]
        return values

    def _decode_inputs(self, size: int) -> Inputs:
        longest = min(self.info.max_model_len, self._graph_config.max_seq_len)
        width = -(-longest // self._config.block_size)
        return Inputs.padding(
            size, len(self.info.cache_groups), width, self.info.rope_switch is not None, str(self._device)
        )

    def _token_inputs(self, size: int) -> TokenInputs:
        has_switch = self.info.rope_switch is not None
        return TokenInputs.padding(size, len(self.info.cache_groups), has_switch, str(self._device))


def _is_decode(inputs: GraphInputs) -> bool:
    """One token a sequence (none is empty), and each one's logits, in this order."""
    num_tokens = inputs.token_ids.shape[0]
    return inputs.seq_lens.shape[0] == num_tokens and np.array_equal(inputs.logits_rows.numpy(), np.arange(num_tokens))
