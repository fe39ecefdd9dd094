"""Machine code of the Triton kernels at the sizes of real models: what an interpreter cannot see and a GPU pays for.

Nothing spilled, memory read and written 16 bytes at a time, loads under way while others are used, and on Hopper the
matrix instructions of warp groups wherever rows are many.
"""

from __future__ import annotations

import functools

import pytest
import torch
import triton_interpreter
from triton_interpreter import assert_fits, compile_launches

from fuseline.compile.kernels.triton import (
    activation,
    attention,
    code_linear,
    experts,
    linear,
    matmul,
    norm,
    rope,
    sampling,
)
from fuseline.compile.ops import codes
from fuseline.compile.ops.code_rows import row_words
from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.rope import FP8

__all__ = ["triton_interpreter"]
pytestmark = pytest.mark.slow
SILU = codes.UNARY["silu"]
LAYERS = {
    "llama_8b": (32, 8, 128, 128, {}),
    "llama_1b": (32, 8, 64, 64, {}),
    "qwen_half_b": (14, 2, 64, 64, {}),
    "mixtral": (32, 8, 128, 128, {"window": 4096}),
    "gpt_oss": (64, 8, 64, 64, {"window": 128, "sinks": True}),
    "gemma": (8, 4, 256, 256, {"softcap": 50.0, "window": 4096}),
    "deepseek": (128, 128, 192, 128, {}),
    "deepseek_latent": (128, 1, 576, 512, {}),
    "llama_8b_e4m3": (32, 8, 128, 128, {"cache": torch.float8_e4m3fn}),
    "llama_8b_e5m2": (32, 8, 128, 128, {"cache": torch.float8_e5m2}),
}
"""Heads, kv heads, key dim, value dim."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(tokens: int, seqs: int, layer: tuple) -> None:
    heads, kv_heads, key_dim, value_dim, options = layer
    dtype = options.get("cache", torch.bfloat16)
    scale = meta(1, dtype=torch.float32) if dtype in FP8 else None
    attention.paged_attention(
        meta(1, tokens, heads, value_dim), meta(1, tokens, heads, key_dim).transpose(1, 2),
        *(meta(1 << 17, kv_heads, 16, dim, dtype=dtype) for dim in (key_dim, value_dim)),
        *(meta(*shape, dtype=torch.int32) for shape in ((seqs, 8192), (seqs,), (seqs + 1,))),
        meta(heads) if "sinks" in options else None, options.get("window", 0), key_dim**-0.5,
        options.get("softcap", 0.0), scale, scale,
    )  # fmt: skip


def mix(num_experts: int, hidden: int, dim: int, top_k: int, tokens: int, act: str = "silu") -> None:
    """As Mixtral has its weights; with glu_oss as gpt-oss has them: transposed, gates and ups in turns."""
    is_oss = act == "glu_oss"
    first, second = meta(num_experts, 2 * hidden, dim), meta(num_experts, dim, hidden)
    if is_oss:
        first, second = meta(num_experts, dim, 2 * hidden), meta(num_experts, hidden, dim)
    experts.experts(
        meta(tokens, dim), meta(tokens, top_k, dtype=torch.int64), meta(tokens, top_k), first, second,
        meta(num_experts, 2 * hidden) if is_oss else None, meta(num_experts, dim) if is_oss else None,
        codes.EXPERT_ACTS[act], is_oss, 1.702, 7.0,
    )  # fmt: skip


def pick(rows: int, vocab: int, dtype: torch.dtype) -> None:
    row = functools.partial(meta, rows)
    ints, longs, floats = (row(dtype=dtype) for dtype in (torch.int32, torch.int64, torch.float32))
    starts, none = meta(rows + 1, dtype=torch.int64), meta(0, dtype=torch.int64)
    sampling.sample(
        longs, floats, longs, row(8, dtype=torch.int64), row(8, dtype=torch.float32), row(dtype=torch.bool),
        meta(rows, vocab, dtype=dtype), floats, ints, floats, floats, floats, floats, floats, longs, longs,
        ints, starts, none, ints, starts, none, floats[:0], starts, none, starts, none, None, 0,
    )  # fmt: skip


def coded(kind: str, group: int, num_out: int, num_in: int) -> tuple:
    """Arguments of an op from a weight of codes on."""
    words = meta(num_out, row_words(num_in, 8 if kind in ("int8", "fp8") else 4), dtype=torch.int32)
    scales = meta(num_in // group if group else 1, num_out)
    return words, scales, None, meta(16, dtype=torch.float32) if kind == "nf4" else None


def multiply_codes(arch: int) -> None:
    """As int4 with groups of 32 and 128, int8 of 128, fp8 a row and nf4 of 64 are in a model of 8B."""
    kinds = ("int4", 32), ("int4", 128), ("int8", 128), ("fp8", 0), ("nf4", 64)
    for kind, group in kinds[: None if arch == 90 else 1]:
        parts = coded(kind, group, 28672, 4096)
        for rows in (1, 256):
            code_linear.linear_code_rows(meta(rows, 4096), *parts, None, None, group, KINDS[kind])
        code_linear.decode(meta(4096, 4096), *parts, 0, group, KINDS[kind])


def launches(arch: int) -> None:
    for name, layer in LAYERS.items():
        if arch == 90 or name in ("llama_8b", "deepseek", "gemma"):
            attend(256, 256, layer)
            attend(8192, 4, layer)
    for tokens in (1, 8192):
        mix(256, 2048, 7168, 8, tokens)
        mix(32, 2880, 2880, 4, tokens, "glu_oss")
    multiply_codes(arch)
    matmul.matmul(meta(4096, 4096), meta(6144, 4096))
    linear.linear(meta(16, 4096), meta(128256, 4096))
    linear.linear_act_mul(meta(1, 4096), meta(28672, 4096), None, SILU)
    norm.add_rms_norm(meta(8192, 4096), meta(8192, 4096), meta(4096), 1e-5, 0)
    activation.act_mul(*meta(8192, 28672).chunk(2, -1), SILU)
    rows = meta(256, dtype=torch.int64)
    q, k, v = (x.unflatten(-1, (-1, 128)).transpose(1, 2) for x in meta(1, 256, 6144).split((4096, 1024, 1024), -1))
    caches = (meta(1 << 17, 8, 16, 128) for _ in "kv")
    rope.rope_cache(*caches, q, k, v, meta(8192, 128), meta(8192, 128), rows, rows, 128, 0)
    for dtype in (torch.bfloat16, torch.float32):
        pick(256, 128256, dtype)


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return compile_launches("test_triton_code", 90, 80)


def of(entries: list[dict], *kernels: str, arch: int = 90, **constants: int) -> list[dict]:
    found = [e for e in entries if e["kernel"] in kernels and e["arch"] == arch]
    found = [e for e in found if constants.items() <= e["constants"].items()]
    assert {e["kernel"] for e in found} == set(kernels)
    return found


def test_nothing_is_spilled_and_all_fits(entries):
    assert_fits(entries)
    # Values of the latent head fill the registers of two warp groups.
    spilled = [e for e in entries if e["arch"] == 90 and e["code"]["stack"] and e["constants"].get("E") != 512]
    assert not spilled


def many(entries: list[dict]) -> list[dict]:
    found = of(entries, "prefill_kernel", "matmul_kernel") + of(entries, "gate_up_kernel", "down_kernel", ROWS=128)
    return found + of(entries, "codes_kernel", ROWS=64)


def test_rows_that_are_many_are_multiplied_by_warp_groups(entries):
    """But for those over fp8, which were wrong on a GPU."""
    for e in many(entries):
        is_coded = e["types"].get("k_cache", "*bf16") != "*bf16"
        assert (e["code"]["wgmma"] > 0, e["code"]["mma"] > 0) == (not is_coded, is_coded), e


def test_tiles_come_asynchronously_and_sixteen_bytes_at_a_time(entries):
    """But for the block table's numbers, and what of an fp8 cache or of few keys is no more than eight a thread."""
    for e in of(entries, "few_rows_kernel", "gate_up_kernel", "down_kernel", "matmul_kernel"):
        assert e["code"]["copies"] == [16], e
    for e in of(entries, "decode_kernel", "prefill_kernel"):
        is_narrow = e["types"]["k_cache"] != "*bf16" or e["constants"]["E"] == 512
        assert set(e["code"]["copies"]) - ({8} if is_narrow else set()) == {4, 16}, e


def test_keys_are_under_way_while_others_are_used(entries):
    """A loop that waits until no copy is under way has the whole latency of memory in each step."""
    for e in of(entries, "decode_kernel", "prefill_kernel") + of(entries, "decode_kernel", "prefill_kernel", arch=80):
        assert max(e["code"]["waits"]) >= 4, e


def test_what_is_bound_by_memory_reads_and_writes_sixteen_bytes(entries):
    for e in of(entries, "norm_kernel", "act_mul_kernel", "combine_kernel"):
        assert max(e["code"]["stores"]) == 16, e
    for e in of(entries, "norm_kernel", "act_mul_kernel", "combine_kernel", "merge_kernel", "scan_kernel"):
        assert max(e["code"]["loads"]) >= (16 if e["constants"].get("PADDED_E") != 64 else 8), e
    for e in of(entries, "rope_cache_kernel"):
        assert min(e["code"]["loads"]) == 8 and min(e["code"]["stores"]) == 8, e


def test_a_score_is_scaled_alike_whether_its_tile_is_masked(entries):
    """A product fused with the difference behind it is rounded once, which a mask between the two prevents."""
    for e in of(entries, "decode_kernel", "prefill_kernel") + of(entries, "decode_kernel", "prefill_kernel", arch=80):
        assert e["code"]["fused_differences"] == 0, e


def test_activations_are_read_like_weights(entries):
    """No load of a single number but of biases and scores."""
    for e in of(entries, "gate_up_kernel"):
        has_bias = e["types"]["bias"] != "constexpr"
        assert (2 in e["code"]["loads"]) == has_bias, e


def test_sampling_reads_faster_than_it_computes(entries):
    """The pass over all logits divides none of them, and rows of a full step of 256 run at once."""
    for e in of(entries, "scan_kernel"):
        assert e["code"]["divisions"] == 0 and max(e["code"]["loads"]) == 16, e
    for e in of(entries, "sample_kernel"):
        assert e["code"]["registers"] <= 128, e
