"""Steps that mix prompts and decoding as one CUDA graph each, attention included.

The grids of our attention follow from the sizes of tensors alone: which program computes what is found on the device,
from where each sequence begins. So a graph of T tokens and S sequences computes any step of at most as many. A step is
padded with tokens that are stored nowhere and sequences without tokens, whose programs end at once. What does not fit
(more sequences or wanted rows, longer block tables) is replayed in segments (piecewise.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fuseline.compile.backends.cuda.captured import StepGraphs
from fuseline.compile.backends.cuda.executable import CudaExecutable
from fuseline.compile.backends.cuda.segments import map_tensors
from fuseline.compile.graph_inputs import GraphOutput, graph_values, narrowed, padding
from fuseline.compile.kernels.triton.batch import pad_sequences, pad_tokens
from fuseline.compile.ops.registry import op_of

OURS = ("cuda.", "triton.")


class MixedInputs:
    """Fixed memory of a graph's inputs for up to `size` tokens of up to `most` sequences, by field of StepInputs."""

    def __init__(
        self, size: int, most: int, width: int, num_groups: int, has_rope_switch: bool, device: str
    ) -> None:  # fmt: skip
        """`width`: columns of the block tables."""
        self.most = most
        self.width = width
        num_seqs = self.num_seqs(size)
        self.tokens = padding({"T": size}, num_groups, device)
        self.sequences = padding({"S": num_seqs, "S1": num_seqs + 1, "R": num_seqs, "M": width}, num_groups, device)
        self._has_rope_switch = has_rope_switch

    def num_seqs(self, size: int) -> int:
        """Sequences of a graph of `size` tokens: fewer than tokens, by which attention knows that it is no decode step;
        two at least, as one alone would never be of a single token."""
        return min(max(2, self.most), size - 1)

    def values(self, size: int) -> dict[str, Tensor]:
        """Graph inputs by placeholder name, for `size` tokens."""
        num_seqs = self.num_seqs(size)
        sizes = {"T": size, "S": num_seqs, "S1": num_seqs + 1, "R": num_seqs}
        return graph_values(narrowed(self.tokens | self.sequences, sizes), self._has_rope_switch)

    def fill(self, step: Mapping[str, Tensor], size: int) -> None:
        """Takes a step over, padded to `size` tokens."""
        pad_tokens(self.tokens, step, size)
        pad_sequences(self.sequences, step, self.num_seqs(size))

    def pad(self, size: int) -> None:
        """Fills a step of `size` tokens with padding."""
        self.fill(self.tokens | self.sequences, size)


@dataclass
class WholeMixedGraphs(StepGraphs[MixedInputs]):
    """Graphs of whole steps, by padded number of tokens; results are of all rows or of all tokens."""

    def __post_init__(self) -> None:
        if not has_fixed_grids(self.executable):
            self.sizes = ()
        super().__post_init__()

    def run(self, step: Mapping[str, Tensor]) -> GraphOutput | None:
        """Results on the current stream; None if no captured graph fits the step, by field of StepInputs."""
        num_tokens, num_rows = step["token_ids"].shape[0], step["logits_rows"].shape[0]
        size = next((size for size in self.sizes if size >= num_tokens), None)
        graph = self.captured.get(size)
        if graph is None:
            return None
        most = self._inputs.num_seqs(size)
        if max(step["seq_lens"].shape[0], num_rows) > most or step["block_tables"].shape[2] > self._inputs.width:
            return None
        self._inputs.fill(step, size)
        graph.replay()
        return map_tensors(graph.results, lambda x: x[:, : num_rows if x.shape[1] == most else num_tokens])


def has_fixed_grids(executable: CudaExecutable) -> bool:
    """Whether the grids of all attention follow from shapes: true of our kernels, unknown of a library's."""
    ops = ((op_of(node.target), kernel.label) for node, kernel in executable.kernels.items())
    labels = {label for op, label in ops if op is not None and op.reads_cache}
    return all(part.startswith(OURS) for label in labels for part in label.replace(" | ", ", ").split(", "))
