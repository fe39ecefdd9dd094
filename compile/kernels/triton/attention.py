"""Attention over a paged cache on CUDA: decode with split keys, prefill by tiles of queries, mixed batches in one call.

A program takes a tile of rows: all query heads of one kv head times some neighbouring tokens of one sequence, so a key
or value is read once for all of them. Sequences of few tokens go to the decode kernel, which cuts their keys into
splits, and the rest to the prefill kernel; which is which is decided on the device, the grids come from shapes alone.

What a row of the decode kernel sums, and in which order, follows from its sequence alone: the cuts between splits come
from the sequence's keys, the splits are folded from the first to the last, and it is the same fold whether one program
does it in registers or the merge kernel from the workspace. The other sequences of the batch never change its bits.
A row of the prefill kernel sums its keys from the first to the last, a block of KEYS at a time, and blocks that it does
not see leave it as it is: its bits are the same in any tile. The two kernels' orders differ, so that a token's bits
depend on how many of its sequence come with it, unless all go to the prefill kernel.

Legend: H query heads, K kv heads, G = H / K, T query tokens, S sequences, N blocks of B keys, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation, tunings
from fuseline.compile.kernels.triton.attention_kernels import decode_kernel, merge_kernel, prefill_kernel
from fuseline.compile.ops.library import DECODE, PREFILL

LOG2_E = 1.4426950408889634
NO_WINDOW = 1 << 30
SPLIT = 256  # keys of the shortest split
GRID_TARGET = 1024  # programs that fill a GPU: more workers a sequence are launched only below it


@dataclass(frozen=True)
class Tuning:
    """Launch parameters that do not change a bit of the output; 0 leaves it to AttentionShape."""

    num_stages: int = 0
    rows: int = 0
    """Rows of a prefill kernel tile, sixteen a warp: a row's keys are summed in the same steps."""
    grid: int = 0
    """Programs of the decode kernel that fill a GPU."""

    def __str__(self) -> str:
        named = ((self.num_stages, "s"), (self.rows, "r"), (self.grid, "g"))
        return " ".join(f"{value}{unit}" for value, unit in named if value)


DECODE_TUNINGS = (Tuning(7), Tuning(3), Tuning(grid=512), Tuning(grid=4096), Tuning(7, grid=4096))
PREFILL_TUNINGS = (Tuning(7), Tuning(3), Tuning(rows=64), Tuning(3, rows=64))
"""Measured by -O3 beside what a launch chooses itself."""


def paged_attention(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    query_start: Tensor, sinks: Tensor | None, window: int, scale: float, softcap: float,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, slopes: Tensor | None = None, chunk: int = 0, *,
    prefill_from: int = 0, tuning: Tuning | None = None,
) -> None:  # fmt: skip
    """out[1, T, H, E] of q[1, H, T, D] over caches [N, K, B, D|E], as compile/ops/attention.py defines it.

    block_table [S, M], seq_lens [S], query_start [S + 1] are integers on the device; tokens behind query_start[S] are
    left alone, a sequence without keys (padding) gives zeros. The caches have q's dtype, another float dtype, or hold
    float8_e5m2 or float8_e4m3fn (also as uint8): k_scale[1] and v_scale[1] (float32) times the stored number is the
    value.

    The workspace of the splits' partial sums comes from torch's allocator, which under graph capture is the graph's own
    pool, reused from layer to layer. Nothing waits for the device. `prefill_from`: the prefill kernel takes sequences
    of so many tokens, and nobody the others; 0: the decode kernel takes those of few.
    """
    _check(q, k_cache, v_cache)
    if q.shape[2] == 0 or seq_lens.shape[0] == 0:
        return
    k_cache, v_cache = _readable(k_cache), _readable(v_cache)
    shape = replace(AttentionShape.of(q, k_cache, v_cache, block_table), tuning=tuning or Tuning())
    window = chunk or (window if window > 0 else NO_WINDOW)
    tensors = (out, q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, k_scale, v_scale, slopes)
    strides = (
        out.stride(1), out.stride(2), q.stride(1), q.stride(2), *k_cache.stride()[:3], *v_cache.stride()[:3],
        block_table.stride(0),
    )  # fmt: skip
    numbers = (window, scale * LOG2_E, softcap)
    options = {"IS_CHUNKED": chunk > 0, "HAS_SOFTCAP": softcap > 0, "HAS_SLOPES": slopes is not None}
    if not prefill_from:
        _launch_decode(shape, tensors, strides, numbers, options)
    if prefill_from or not shape.is_all_decode:
        tile, most = shape.prefill, prefill_from - 1 if prefill_from else shape.decode.tokens
        grid = (shape.num_tokens // tile.tokens + shape.num_seqs, shape.kv_heads * tile.parts)
        prefill_kernel[grid](
            *tensors, *strides, *numbers, shape.num_seqs, most, GROUP=shape.group,
            IS_WINDOWED=window < NO_WINDOW, **options, **shape.constants(), **tile.constants(),
        )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """The work of one program: `heads` of a kv head's query heads (its `parts`) times `tokens`, in `rows` rows."""

    rows: int
    heads: int
    tokens: int
    parts: int
    keys: int
    num_warps: int
    num_stages: int

    @staticmethod
    def of(group: int, rows: int, keys: int, num_warps: int, num_stages: int) -> Tile:
        heads = min(group, rows)
        return Tile(rows, heads, rows // heads, -(-group // heads), keys, num_warps, num_stages)

    def constants(self) -> dict[str, int]:
        return {
            "ROWS": self.rows, "HEADS": self.heads, "TOKENS": self.tokens, "PARTS": self.parts, "KEYS": self.keys,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


@dataclass(frozen=True)
class AttentionShape:
    """Everything launches are made of: sizes known on the host without asking the device."""

    num_tokens: int
    num_seqs: int
    kv_heads: int
    group: int
    block_size: int
    key_dim: int
    value_dim: int
    max_keys: int
    item_size: int
    tuning: Tuning = Tuning()
    is_coded: bool = False
    """Whether keys and values are read as fp8."""

    @staticmethod
    def of(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> AttentionShape:
        _, kv_heads, block_size, key_dim = k_cache.shape
        return AttentionShape(
            q.shape[2], block_table.shape[0], kv_heads, q.shape[1] // kv_heads, block_size, key_dim, v_cache.shape[3],
            block_table.shape[1] * block_size, q.element_size(), is_coded=k_cache.element_size() == 1,
        )  # fmt: skip

    @property
    def padded_key_dim(self) -> tuple[int, int]:
        """D as sizes of two matrix products, powers of two, the second perhaps 0."""
        whole = padded(self.key_dim)
        rest = padded(self.key_dim - whole // 2) if self.key_dim > 16 else whole
        return (whole // 2, rest) if rest < whole // 2 else (whole, 0)

    @property
    def padded_value_dim(self) -> int:
        """E as the size of a matrix product."""
        return padded(self.value_dim)

    @property
    def widest(self) -> int:
        """Bytes of a line in registers, of keys or of values."""
        return max(sum(self.padded_key_dim), self.padded_value_dim) * self.item_size

    @property
    def decode(self) -> Tile:
        widest, stages = self.widest, self.tuning.num_stages
        if widest > 512 and self.item_size == 2:
            most, keys, num_warps = 32, 16, 8
        else:
            most, keys, num_warps = 64 if widest <= 512 else 16, 64 if widest <= 256 else 32, 4
        rows = min(most, max(16, triton.next_power_of_2(self.group)))
        return Tile.of(self.group, rows, keys, num_warps, stages or self.default_stages)

    @property
    def prefill(self) -> Tile:
        """Sixteen rows a warp, four warps a Hopper matrix instruction; keys as the registers allow beside the sums."""
        widest, stages = self.widest, self.tuning.num_stages or self.default_stages
        if widest > 512 and self.item_size == 4:
            size = 32 if widest <= 1024 else 16
            return Tile.of(self.group, size, size, 4, stages)
        if self.is_coded and self.item_size == 2:
            # Too few rows for the instructions of warp groups, whose results over fp8 were wrong on an H200 (Triton
            # 3.6); those of the decode kernel, which are these, were right.
            return Tile.of(self.group, 32, 16 if widest > 512 else 64 if widest <= 256 else 32, 4, stages)
        if widest > 512:
            return Tile.of(self.group, 64, 16, 8, stages)
        rows = self.tuning.rows or (64 if self.item_size == 4 and widest > 256 else 128)
        return Tile.of(self.group, rows, 64 if widest <= 384 else 32, rows // 16, stages)

    @property
    def default_stages(self) -> int:
        """Half of them go to the block table, whose entries the loads of keys wait for: of 5, keys and values come two
        tiles ahead, of 3 or 4 just when they are needed."""
        return 2 if self.widest > 512 and self.item_size == 4 else 5

    @property
    def is_all_decode(self) -> bool:
        """As many sequences as tokens: the decode kernel takes them all, any number of tiles of each."""
        return self.num_tokens <= self.num_seqs

    @property
    def num_splits(self) -> int:
        """The most splits of a row. A constant of the model, so that it cannot depend on the batch."""
        return min(64, max(8, 256 // (self.kv_heads * self.decode.parts)))

    @property
    def most_splits(self) -> int:
        """The most splits a row of this batch can have: its keys fill a table's line at most."""
        return min(self.num_splits, -(-self.max_keys // SPLIT))

    @property
    def num_workers(self) -> int:
        """Programs that share the splits of one tile."""
        tiles = self.num_seqs * self.kv_heads * self.decode.parts
        return min(max(4, (self.tuning.grid or GRID_TARGET) // tiles), self.most_splits)

    @property
    def is_folding(self) -> bool:
        """Whether a program has the registers to merge splits: a second sum of values beside the one under way."""
        return self.widest <= 512

    @property
    def max_folded(self) -> int:
        """Most splits that one program merges in its registers: all, if other programs keep the GPU busy."""
        busy = self.num_seqs * self.kv_heads * self.decode.parts // 64
        return min(8, max(1, busy)) if self.is_folding else 1

    @property
    def num_slots(self) -> int:
        """Tokens that the decode kernel may have to keep partial sums of."""
        return self.num_tokens if self.is_all_decode else self.num_seqs * self.decode.tokens

    @property
    def workspace_size(self) -> int:
        """float32 elements: sums [slots, H, splits, E], then maxima and weights [slots, H, splits, 2]."""
        if self.most_splits <= self.max_folded:
            return 0
        return self.num_slots * self.kv_heads * self.group * self.num_splits * (self.value_dim + 2)

    def constants(self) -> dict[str, int]:
        key_dim, rest = self.padded_key_dim
        return {
            "B": self.block_size, "D": self.key_dim, "E": self.value_dim, "PADDED_D": key_dim, "REST": rest,
            "PADDED_E": self.padded_value_dim,
        }  # fmt: skip


def padded(dim: int) -> int:
    """The least size of a matrix instruction's side that holds it."""
    return max(16, triton.next_power_of_2(dim))


def _launch_decode(
    shape: AttentionShape, tensors: tuple, strides: tuple, numbers: tuple[int, float, float], options: dict[str, bool]
) -> None:  # fmt: skip
    tile = shape.decode
    workspace = torch.empty(shape.workspace_size, dtype=torch.float32, device=tensors[0].device)
    out, q, *_, seq_lens, query_start, sinks, _, v_scale, _ = tensors
    splits = {"IS_ALL": shape.is_all_decode, "SPLIT": SPLIT, "NUM_SPLITS": shape.num_splits}
    grid = (shape.kv_heads * tile.parts, shape.num_seqs, shape.num_workers)
    decode_kernel[grid](
        *tensors, workspace, *strides, *numbers, q.shape[1], shape.num_slots, shape.max_folded,
        GROUP=shape.group, IS_FOLDING=shape.is_folding, **options, **splits, **shape.constants(), **tile.constants(),
    )  # fmt: skip
    if shape.workspace_size == 0:
        return
    grid = (shape.kv_heads * shape.group, shape.num_seqs, 1 if shape.is_all_decode else tile.tokens)
    merge_kernel[grid](
        out, seq_lens, query_start, sinks, v_scale, workspace, out.stride(1), out.stride(2), numbers[0],
        shape.num_slots, shape.max_folded, **splits, IS_CHUNKED=options["IS_CHUNKED"], TOKENS=tile.tokens,
        KEYS=tile.keys, E=shape.value_dim, PADDED_E=shape.padded_value_dim, num_warps=1,
    )  # fmt: skip


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if q.stride(3) != 1 or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("paged_attention needs the last dimension of q and of the caches contiguous")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k_cache.shape[1]} kv heads")


def _readable(cache: Tensor) -> Tensor:
    """An e4m3 cache as bytes where the device has no such numbers (before sm_89); e5m2 every device has."""
    if cache.dtype != torch.float8_e4m3fn or not cache.is_cuda:
        return cache
    return cache if torch.cuda.get_device_capability(cache.device) >= (8, 9) else cache.view(torch.uint8)


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object, **options: object) -> Tensor:
    """The op: q[1, H, T, D] over caches [N, K, B, D|E] -> [1, T, H, E]; options as above."""
    out = q.new_empty(1, q.shape[2], q.shape[1], v_cache.shape[3])
    attention_into(out, q, k_cache, v_cache, *rest, **options)
    return out


def attention_into(out: Tensor, q: Tensor, *rest: object, **options: object) -> None:
    paged_attention(out, q if q.stride(3) == 1 else q.contiguous(), *rest, **options)


IMPLEMENTATIONS = (
    Implementation(
        "paged_attention", "triton.paged_attention", "cuda", attention, into=attention_into, phases=(DECODE, PREFILL),
        tunings=(
            *tunings("tuning", DECODE_TUNINGS, phases=(DECODE,)),
            *tunings("tuning", PREFILL_TUNINGS, phases=(PREFILL,)),
        ),
    ),
    Implementation(
        "paged_attention_invariant", "triton.paged_attention_invariant", "cuda", partial(attention, prefill_from=1)
    ),
)  # fmt: skip
