"""Attention over a cache of latents: a row depends neither on its batch, nor on chunks or threads."""

from __future__ import annotations

import pytest
import torch
from native_attention_cases import Cache, make_queries
from native_fixtures import isa, ops, plain_keys, with_threads

from fuseline.compile.ops.codes import CACHES
from fuseline.compile.ops.rope import to_int8

__all__ = ["isa"]


class LatentCache(Cache):
    """One kv head; a value is the beginning of its key. `stored`: the dtype of codes, if it holds some."""

    def __init__(self, lengths: list[int], value_dim: int, stored: torch.dtype | None, **options: object) -> None:
        super().__init__(lengths, kv_heads=1, value_dim=value_dim, **options)
        self.values = [keys[..., :value_dim] for keys in self.keys]
        self.latents, self.value_dim, self.stored = plain_keys(self.k_cache), value_dim, stored
        if stored == torch.int8:
            self.latents = to_int8(self.latents.float())
        elif stored is not None:
            self.latents = (self.latents.float() / SCALE).to(stored)

    def run(self, tensors, ints, floats):
        out, q, _, _, *batch, _ = tensors
        if self.stored is None:
            return ops.paged_latent_attention(out, q, self.latents, *batch, self.value_dim, ints[0], *floats)
        scale, code = None if self.stored == torch.int8 else SCALE, CACHES[str(self.stored).removeprefix("torch.")]
        args = (out, q, self.latents, *batch, scale, self.value_dim, ints[0], code, *floats)
        return ops.paged_latent_attention_codes(*args)


SCALE = torch.tensor([0.5])
BOUNDS = {
    torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.int8: 0.02, torch.float8_e4m3fn: 0.08,
    torch.float8_e5m2: 0.16,
}  # fmt: skip
"""Relative error of a whole result."""
WINDOWED = {"window": 50, "sinks": torch.linspace(-1, 1, 20)}


@pytest.mark.parametrize(
    ("block_size", "key_dim", "value_dim", "dtype", "stored", "options"),
    [
        (16, 72, 64, torch.float32, None, {}), (20, 90, 37, torch.float32, None, WINDOWED),
        (16, 72, 64, torch.bfloat16, None, WINDOWED), (20, 90, 37, torch.bfloat16, None, {}),
        (16, 40, 24, torch.float16, None, {}), (16, 72, 64, torch.float32, torch.int8, WINDOWED),
        (20, 92, 37, torch.bfloat16, torch.int8, {}), (16, 72, 64, torch.bfloat16, torch.float8_e4m3fn, {}),
        (20, 92, 37, torch.float32, torch.float8_e5m2, WINDOWED),
    ],
)  # fmt: skip
def test_a_row_does_not_depend_on_batch_chunking_or_threads(
    isa, block_size, key_dim, value_dim, dtype, stored, options
):
    """Slots that hold nothing are NaN: they are never read."""
    lengths = [300, 90, 33]
    cache = LatentCache(lengths, value_dim, stored, dtype=dtype, key_dim=key_dim, block_size=block_size)
    queries = make_queries(lengths, heads=20, key_dim=key_dim, dtype=dtype)
    options = {name: one.to(dtype) if name == "sinks" else one for name, one in options.items()}
    whole = cache.attend(queries, **options)
    for s, n in enumerate(lengths):
        error = whole[s].double() - cache.reference(s, queries[s], n, **options)
        assert error.norm() < BOUNDS[stored or dtype] * whole[s].double().norm()
        for begin, end in [(0, 1), (n - 1, n), (n - 30, n), (n // 3, n // 2)]:
            part = with_threads(1 + s % 2, lambda s=s, b=begin, e=end: cache.attend([queries[s][:, b:e]], [e], [s],
                                                                                   **options)[0])  # fmt: skip
            assert torch.equal(part, whole[s][begin:end]), (s, begin, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_of_heads_does_not_depend_on_the_others(isa, dtype):
    """Of few rows, and of more than a task has."""
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(1, 90, 3, 530, generator=gen).to(dtype).transpose(1, 2)
    panels = torch.randn(3, 9, 530, 16, generator=gen).to(dtype)

    def run(rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(1, rows.shape[2], 3, 140, dtype=dtype)
        ops.head_linear(out, rows, panels, 140)
        return out

    whole = run(x)
    for begin, end in [(0, 1), (40, 43), (70, 90)]:
        assert torch.equal(with_threads(2, lambda b=begin, e=end: run(x[:, :, b:e])), whole[:, begin:end])
