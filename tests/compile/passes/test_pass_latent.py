"""Attention over latents instead of the heads that are expanded from them: the same numbers, a smaller cache."""

from __future__ import annotations

import pytest
import torch
from pass_cases import DTYPES, Case, case
from torch import Tensor, nn

from fuseline.compile.passes.absorb_latent import absorb_latent
from fuseline.compile.passes.clean import canonicalize, merge_equal, remove_noops
from fuseline.compile.passes.find_cat import find_cat
from fuseline.compile.passes.find_linear import find_linear
from fuseline.compile.passes.fuse_rope_cache import fuse_rope_cache
from fuseline.compile.passes.page_attention import page_attention
from fuseline.compile.specs import CacheSpec

TOKENS, HEADS, NOPE, PE, VALUE, RANK = 6, 4, 16, 8, 12, 20
OPS = torch.ops.fuseline
INPUTS = {
    "q": torch.randn(1, HEADS, TOKENS, NOPE + PE), "latent": torch.randn(1, 1, TOKENS, RANK),
    "k_pe": torch.randn(1, 1, TOKENS, PE),
}  # fmt: skip
CLEAN = (remove_noops, find_cat, canonicalize, merge_equal, find_linear)


class Expanded(nn.Module):
    """`change` is a near miss."""

    def __init__(self, change: str = "", rank: int = RANK, is_filled: bool = False) -> None:
        super().__init__()
        self.kv_b = nn.Linear(rank, HEADS * (NOPE + VALUE), bias=change == "bias")
        self.change, self.is_filled = change, is_filled

    def forward(self, q, latent, k_pe):
        expanded = self.kv_b(latent).view(1, TOKENS, HEADS, NOPE + VALUE).transpose(1, 2)
        k_nope, v = torch.split(expanded, [NOPE, VALUE], dim=-1)
        k = self.keys(k_nope, k_pe.expand(-1, HEADS, -1, -1))
        v = v * 2.0 if self.change == "scaled values" else v
        q = torch.cat((q[..., :NOPE], q[..., NOPE:].exp()), -1) if self.is_filled else q
        return OPS.attention(q, k, v, None, 0, 0.2, 0, 0.0, True, None, 4 if self.change == "chunks" else 0)

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        if self.change == "turned keys":
            return torch.cat((k_pe, k_nope), -1)
        if not self.is_filled:
            return torch.cat((k_nope, k_pe), -1)
        k = k_nope.new_empty(*k_nope.shape[:-1], NOPE + PE)
        k[..., :NOPE].copy_(k_nope)
        k[..., NOPE:].copy_(k_pe)
        return k


def latent_case(module: Expanded, dtype: torch.dtype) -> Case:
    rank = module.kv_b.in_features
    found = case(module, dtype, **(INPUTS | {"latent": torch.randn(1, 1, TOKENS, rank)}))
    found.values["kv_b.weight"] /= rank**0.5
    return found


@DTYPES
@pytest.mark.parametrize("is_filled", [False, True])
def test_heads_become_latents(is_filled: bool, dtype: torch.dtype) -> None:
    found = latent_case(Expanded(is_filled=is_filled), dtype)
    before = found.run()
    assert found.apply(*CLEAN, absorb_latent) == 1
    assert found.ops()["head_linear"] == 2 and not {"linear", "aten.expand"} & set(found.ops())
    rounding = 4e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.run(), before, rtol=rounding, atol=rounding)
    assert found.apply(page_attention) == 1
    name = str(dtype).removeprefix("torch.")
    spec = CacheSpec(0, 1, RANK + PE, 0, name)
    assert found.results[-1].specs[0] == spec and spec.bytes_per_token() == (RANK + PE) * dtype.itemsize
    assert found.ops()["write_latent"] == 1 == found.ops()["paged_latent_attention"]
    torch.testing.assert_close(found.run(**paged(dtype)), before, rtol=rounding, atol=rounding)


def paged(dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of one sequence's step."""
    return {
        "k_cache_0": torch.zeros(2, 1, 16, RANK + PE, dtype=dtype), "slots_0": torch.arange(TOKENS) + 16,
        "block_table_0": torch.tensor([[1]], dtype=torch.int32), "seq_lens": torch.tensor([TOKENS], dtype=torch.int32),
        "query_start": torch.tensor([0, TOKENS], dtype=torch.int32),
    }  # fmt: skip


@pytest.mark.parametrize("change", ["bias", "scaled values", "turned keys", "chunks"])
def test_other_heads_stay(change: str) -> None:
    found = latent_case(Expanded(change), torch.float32)
    before = found.run()
    assert found.apply(*CLEAN, absorb_latent) == 0
    assert torch.equal(found.run(), before)


def test_a_latent_that_is_larger_than_its_heads_stays_out_of_the_cache() -> None:
    assert latent_case(Expanded(rank=160), torch.float32).apply(*CLEAN, absorb_latent) == 0


@DTYPES
@pytest.mark.parametrize(
    ("change", "fused"), [("", 1), ("other table", 0), ("plain keys", 0), ("queries read again", 0)]
)  # fmt: skip
def test_rotation_and_write_of_latents_are_one(change: str, fused: int, dtype: torch.dtype) -> None:
    def module(q_nope, q_pe, latent, k_pe, rows, cos, sin):
        q = torch.cat((q_nope, OPS.rope(q_pe, cos, sin, rows, PE, 2)), -1)
        turned = OPS.rope(k_pe, cos, cos if change == "other table" else sin, rows, PE, 2)
        k = torch.cat((latent, k_pe if change == "plain keys" else turned), -1)
        out = OPS.attention(q, k, k[..., :RANK], None, 0, 0.2, 0, 0.0, True)
        return (out, q) if change == "queries read again" else out

    inputs = {
        "q_nope": torch.randn(1, HEADS, TOKENS, RANK), "q_pe": torch.randn(1, HEADS, TOKENS, PE),
        "latent": torch.randn(1, 1, TOKENS, RANK), "k_pe": torch.randn(1, 1, TOKENS, PE),
        "rows": torch.arange(TOKENS), "cos": torch.randn(TOKENS, PE), "sin": torch.randn(TOKENS, PE),
    }  # fmt: skip
    found = case(module, dtype, **inputs)
    before = found.run()
    assert found.apply(*CLEAN, page_attention, fuse_rope_cache) == fused
    assert found.ops().get("rope_latent", 0) == fused and found.ops().get("write_latent", 0) == 1 - fused
    assert not fused or not {"rope", "aten.cat"} & set(found.ops())
    torch.testing.assert_close(found.run(**paged(dtype)), before, rtol=0, atol=0)
