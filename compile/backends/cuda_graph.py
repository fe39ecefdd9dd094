"""Decode steps as CUDA graphs: a step of one token a sequence is one launch, whatever the model.

A graph is captured for each size of a list and reads its inputs from fixed memory; a step is padded to the next size
with sequences that have no keys and whose token is kept nowhere. Capture runs in the background, largest size first,
while steps are launched op by op; it computes nothing, and its trial runs before it see inputs of padding only.

Memory: graphs share one pool, which they use one after the other. A graph's logits are a view of memory that it does
not hold: the next replay of any graph may write there, as the contract of run() has it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fuseline.compile.backends.cuda import CudaExecutable

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Graph:
    """`output` holds what the last replay gave."""

    replay: Callable[[], None]
    output: Tensor


class GraphApi(Protocol):
    """What capture needs of a device; tests have their own."""

    def warm_up(self, run: Callable[[], Tensor]) -> None: ...

    def capture(self, run: Callable[[], Tensor]) -> Graph: ...


@dataclass
class Inputs:
    """Fixed memory of a graph's inputs for up to P sequences: what pad_decode writes, and what never changes."""

    written: tuple[Tensor, ...]
    """token_ids [P], positions [P], rope_rows [P], seq_lens [P], slots [G, P], tables [G, P, M]."""
    query_start: Tensor
    logits_rows: Tensor
    positions_are_rope_rows: bool

    @staticmethod
    def padding(size: int, num_groups: int, width: int, positions_are_rope_rows: bool, device: str) -> Inputs:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        written = (
            zeros(size), zeros(size), zeros(size), zeros(size, dtype=torch.int32), zeros(num_groups, size) - 1,
            zeros(num_groups, size, width, dtype=torch.int32),
        )  # fmt: skip
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        return Inputs(written, starts, torch.arange(size, device=device), positions_are_rope_rows)

    def values(self, size: int) -> dict[str, Tensor]:
        """Graph inputs by placeholder name, for `size` sequences."""
        tokens, positions, rope_rows, lens, slots, tables = self.written
        values = {
            "token_ids": tokens[None, :size],
            "positions": (rope_rows if self.positions_are_rope_rows else positions)[None, :size],
            "rope_rows": rope_rows[:size], "seq_lens": lens[:size], "query_start": self.query_start[: size + 1],
            "logits_rows": self.logits_rows[:size],
        }  # fmt: skip
        for group in range(slots.shape[0]):
            values[f"slots_{group}"] = slots[group, :size]
            values[f"block_table_{group}"] = tables[group, :size]
        return values


@dataclass
class DecodeGraphs:
    """The graphs of one executable over one set of caches."""

    executable: CudaExecutable
    caches: Mapping[str, Tensor]
    sizes: tuple[int, ...]
    make_inputs: Callable[[int], Inputs]
    api: GraphApi
    num_warmups: int = 1
    graphs: dict[int, Graph] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._inputs = self.make_inputs(max(self.sizes)) if self.sizes else None
        self._thread: threading.Thread | None = None

    def start(self, progress: Progress) -> None:
        """Captures in the background; `progress` is called with ("capturing graphs", done, all)."""
        self._thread = threading.Thread(target=self._capture_all, args=(progress,), name="capture-graphs", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def run(self, step: Mapping[str, Tensor], width: int) -> Tensor | None:
        """Logits [1, S, V] of a step of one token a sequence, on the current stream; None if no graph fits it yet.

        `step` by name as GraphInputs has it, on the device; `width` is that of its tables.
        """
        num_seqs = step["seq_lens"].shape[0]
        size = next((size for size in self.sizes if size >= num_seqs and size in self.graphs), None)
        if size is None or width > self._inputs.written[5].shape[2]:
            return None
        from fuseline.compile.kernels.triton.batch import pad_decode

        names = ("token_ids", "positions", "rope_rows", "seq_lens", "slot_mapping", "block_tables")
        pad_decode(self._inputs.written, [step[name] for name in names], size)
        graph = self.graphs[size]
        graph.replay()
        return graph.output[:, :num_seqs]

    def _capture_all(self, progress: Progress) -> None:
        for done, size in enumerate(reversed(self.sizes)):
            progress("capturing graphs", done, len(self.sizes))
            if self.stop.is_set():
                return
            try:
                self.graphs[size] = self.capture(size)
            except Exception as error:  # serving goes on op by op
                logger.warning("no CUDA graph of %d sequences: %s: %s", size, type(error).__name__, error)
                return
        progress("capturing graphs", len(self.sizes), len(self.sizes))

    def capture(self, size: int) -> Graph:
        trial = self.make_inputs(size).values(size)
        for _ in range(self.num_warmups):
            self.api.warm_up(lambda: self.executable.run({**self.caches, **trial}, is_trial=True))
        fixed = self._inputs.values(size)
        return self.api.capture(lambda: self.executable.run({**self.caches, **fixed}))


class CudaGraphApi:
    """torch.cuda's graphs, on a stream of their own, so that capture and serving do not meet."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        """Compiles kernels and lets libraries take their workspaces, which capture must not do."""
        with torch.cuda.stream(self._stream):
            run()
        self._stream.synchronize()

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Not torch.cuda.graph(): it collects garbage and stops the whole device first. Other threads go on.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = run()
            finally:
                graph.capture_end()
        return Graph(graph.replay, torch.as_tensor(_Memory(output), device=output.device))


class _Memory:
    """A tensor's memory without its ownership."""

    def __init__(self, tensor: Tensor) -> None:
        interface = tensor.__cuda_array_interface__
        self.__cuda_array_interface__ = {**interface, "data": (tensor.data_ptr(), False)}
