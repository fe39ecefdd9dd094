"""Steps as CUDA graphs, captured in the background while steps are launched op by op.

A decode step, of one token per sequence, is one graph for every model. A graph is captured for each size of a list and
reads its inputs from fixed memory; a step is padded to the next size with sequences that have no keys and whose token
is not cached. Mixed steps are captured next, whole where that is asked for (whole_mixed.py), and piecewise
(piecewise.py). Largest sizes come first, so smaller ones reuse their memory in the pool. Capture computes nothing; its
trial runs use padding only.

Memory: all graphs share one pool and never run concurrently. A graph's results are views without ownership: the next
replay of any graph may overwrite them, as the contract of run() allows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fuseline.compile.backends.cuda.captured import StepGraphs
from fuseline.compile.backends.cuda.piecewise import MixedGraphs
from fuseline.compile.backends.cuda.segments import map_tensors
from fuseline.compile.backends.cuda.whole_mixed import WholeMixedGraphs
from fuseline.compile.config import Progress
from fuseline.compile.graph_inputs import GraphOutput, graph_values, narrowed, padding
from fuseline.compile.kernels.triton.batch import pad_decode

logger = logging.getLogger(__name__)


class DecodeInputs:
    """Fixed memory of a graph's inputs for up to `size` sequences of one token each.

    `padded` holds the tensors that pad_decode writes, by field name; the others never change.
    """

    def __init__(self, size: int, width: int, num_groups: int, has_rope_switch: bool, device: str) -> None:
        """`width`: columns of the block tables."""
        self.width = width
        self.padded = padding({"T": size, "S": size, "M": width}, num_groups, device)
        self._fixed = {
            "query_start": torch.arange(size + 1, dtype=torch.int32, device=device),
            "logits_rows": torch.arange(size, device=device),
        }
        self._has_rope_switch = has_rope_switch

    def values(self, size: int) -> dict[str, Tensor]:
        """Graph inputs by placeholder name, for `size` sequences."""
        sizes = {"T": size, "S": size, "S1": size + 1, "R": size}
        return graph_values(narrowed(self.padded | self._fixed, sizes), self._has_rope_switch)

    def pad(self, size: int) -> None:
        """Fills a step of `size` sequences with padding."""
        pad_decode(self.padded, self.padded, size)


class DecodeGraphs(StepGraphs[DecodeInputs]):
    """Graphs of decode steps, by padded number of sequences."""

    def run(self, step: Mapping[str, Tensor]) -> GraphOutput | None:
        """Results of S rows on the current stream; None if no captured graph fits the step.

        `step`: fields of StepInputs on the device.
        """
        num_seqs = step["seq_lens"].shape[0]
        size = next((size for size in self.sizes if size >= num_seqs and size in self.captured), None)
        if size is None or step["block_tables"].shape[2] > self._inputs.width:
            return None
        pad_decode(self._inputs.padded, step, size)
        graph = self.captured[size]
        graph.replay()
        return map_tensors(graph.results, lambda result: result[:, :num_seqs])


@dataclass
class CapturedSteps:
    """All graphs of one executable with one set of caches, and the thread that captures them."""

    decode: DecodeGraphs
    whole_mixed: WholeMixedGraphs
    mixed: MixedGraphs
    num_warmups: int

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, progress: Progress) -> None:
        """Captures in the background and calls `progress` with ("capturing graphs", done, all)."""
        self._thread = threading.Thread(target=self._capture_all, args=(progress,), name="capture-graphs", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """Stops capture; returns once the current capture has ended."""
        self._stop.set()
        self.wait()

    def _capture_all(self, progress: Progress) -> None:
        kinds = {"sequences": self.decode, "tokens": self.whole_mixed, "tokens, in segments": self.mixed}
        total, done = sum(len(graphs.sizes) for graphs in kinds.values()), 0
        for kind, graphs in kinds.items():
            for size in reversed(graphs.sizes):
                progress("capturing graphs", done, total)
                if self._stop.is_set():
                    return
                try:
                    is_first = size == graphs.sizes[-1]
                    graphs.capture(size, max(self.num_warmups, int(is_first)))
                except Exception as error:  # serving continues op by op
                    logger.warning("no CUDA graph of %d %s: %s: %s", size, kind, type(error).__name__, error)
                    break
                done += 1
        progress("capturing graphs", total, total)
