"""Mixture of experts on CUDA: pairs of token and expert sorted by expert, then two products over tiles of them.

Which tile belongs to which expert is found on the device; grids follow from the number of pairs alone. An expert's
weights are read once for each tile of its pairs, in the layout of the checkpoint, transposed or not.

Legend: T tokens, K experts of a token, E experts, D features, I hidden size of an expert.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation, Tuning, tunings
from fuseline.compile.kernels.triton.experts_kernels import combine_kernel, down_kernel, gate_up_kernel, sort_kernel
from fuseline.compile.kernels.triton.tile import Tile
from fuseline.compile.ops.codes import EXPERT_UNARY

FEATURES = 1024  # of a program that adds the experts of a token up
MANY = 256  # pairs an expert, of which few tiles of 128 are cut off
SORTED = 2048  # pairs that the sort looks at in one step: more of them are more than its registers hold


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, act: int, transposed: bool, alpha: float, limit: float, *, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """x[T, D] through the K experts ids[T, K] of each token, weighted, summed in float32 -> [T, D].

    gate_up [E, 2I, D] and down [E, D, I], or transposed [E, D, 2I] and [E, I, D]. An id outside [0, E) adds nothing.
    A row's bits depend on the `tile`, which follows from the number of pairs unless it is given, and on nothing else.
    """
    ids, weights = ids.contiguous(), weights.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    (num_tokens, dim), top_k, num_experts = x.shape, ids.shape[1], gate_up.shape[0]
    hidden_size = down.shape[1 if transposed else 2]
    num_pairs = num_tokens * top_k
    order = torch.empty(num_pairs + num_experts + 1, dtype=torch.int32, device=x.device)
    starts = order[num_pairs:]
    sort_kernel[(num_experts,)](order, starts, ids, num_pairs, CHUNK=SORTED, num_warps=8)

    tile = tile or default_tile(num_pairs, num_experts, x.element_size())
    num_tiles = num_pairs // tile.rows + num_experts
    shape = {"E": num_experts, "D": dim, "HIDDEN": hidden_size, **tile.constants()}
    hidden = x.new_empty(num_pairs, hidden_size)
    x = x if x.stride(1) == 1 else x.contiguous()
    # The stride of a single row may be any number; a kernel compiled for another kind of number would hold up a step.
    stride = x.stride(0) if num_tokens > 1 else dim
    first, second = (w.transpose(1, 2) if transposed else w for w in (gate_up, down))
    gate_up_kernel[(num_tiles, triton.cdiv(hidden_size, tile.columns))](
        hidden, x, order, starts, first, gate_up_bias, stride, *first.stride(), alpha, limit, ACT=EXPERT_UNARY[act],
        TOP_K=top_k, **shape,
    )  # fmt: skip
    parts = x.new_empty(num_pairs, dim)
    down_kernel[(num_tiles, triton.cdiv(dim, tile.columns))](
        parts, hidden, order, starts, second, down_bias, weights, *second.stride(), **shape
    )
    combine_kernel[(num_tokens, triton.cdiv(dim, FEATURES))](
        out, parts, ids, TOP_K=top_k, E=num_experts, D=dim, BLOCK=min(FEATURES, triton.next_power_of_2(dim))
    )
    return out


def experts_invariant(x: Tensor, *args: object) -> Tensor:
    """`experts` with one tile for any number of pairs."""
    return experts(x, *args, tile=high_tile(x.element_size()))


def default_tile(num_pairs: int, num_experts: int, item_size: int) -> Tile:
    """Low while an expert has few pairs: then the weights' way through memory is all there is. Of half precision the
    highest where they are many: 60 % of an H200's matrix rate instead of 48."""
    if num_pairs <= 32 * num_experts:
        return Tile(16, 64, 256 // item_size, 4, 3)
    return Tile(128, 128, 64, 8, 3) if item_size == 2 and num_pairs >= MANY * num_experts else high_tile(item_size)


def high_tile(item_size: int) -> Tile:
    return Tile(64, 64, 128 // item_size, 4, 3)


def tiles(item_size: int) -> tuple[Tile, ...]:
    """Measured by -O3 beside default_tile: low ones for few pairs an expert, high ones for many."""
    depth = 128 // item_size
    return (
        Tile(16, 128, depth, 4, 4), Tile(32, 64, depth, 4, 4), Tile(64, 128, depth, 4, 3), Tile(128, 128, depth, 8, 3),
    )  # fmt: skip


def _tile_tunings(x: Tensor, *_: object) -> tuple[Tuning, ...]:
    return tunings("tile", tiles(x.element_size()))


IMPLEMENTATIONS = (
    Implementation("experts", "triton.experts", "cuda", experts, tunings=_tile_tunings),
    Implementation("experts_invariant", "triton.experts_invariant", "cuda", experts_invariant),
)
