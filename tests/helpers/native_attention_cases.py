"""Sequences in a paged cache, for tests of the native attention kernels."""

from __future__ import annotations

import torch
from native_fixtures import key_panels, ops


class Cache:
    """Sequences of random keys and values, in a paged cache of shuffled blocks filled up with NaN."""

    def __init__(self, lengths, kv_heads=2, key_dim=32, value_dim=32, block_size=16, dtype=torch.float32, seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.lengths, self.block_size = lengths, block_size
        self.keys = [torch.randn(kv_heads, n, key_dim, generator=gen).to(dtype) for n in lengths]
        self.values = [torch.randn(kv_heads, n, value_dim, generator=gen).to(dtype) for n in lengths]
        per_seq = [-(-n // block_size) for n in lengths]
        order = torch.randperm(sum(per_seq) + 3, generator=gen).to(torch.int32)
        nan = float("nan")
        self.k_cache = torch.full((sum(per_seq) + 3, kv_heads, block_size, key_dim), nan, dtype=dtype)
        self.v_cache = torch.full((sum(per_seq) + 3, kv_heads, block_size, value_dim), nan, dtype=dtype)
        self.table = torch.full((len(lengths), max(per_seq)), -1, dtype=torch.int32)
        for s, blocks in enumerate(order[: sum(per_seq)].split(per_seq)):
            self.table[s, : len(blocks)] = blocks
            for pos in range(lengths[s]):
                self.k_cache[blocks[pos // block_size], :, pos % block_size] = self.keys[s][:, pos]
                self.v_cache[blocks[pos // block_size], :, pos % block_size] = self.values[s][:, pos]
        self.k_cache = key_panels(self.k_cache)

    def attend(self, queries, seen=None, seqs=None, sinks=None, window=0, scale=0.2, softcap=0.0, slopes=None,
               chunk=0):  # fmt: skip
        """queries: one [H, n, D] a sequence, its last n tokens out of `seen`. Returns one [n, H, E] a sequence."""
        seqs = list(range(len(self.lengths))) if seqs is None else seqs
        seen = [self.lengths[s] for s in seqs] if seen is None else seen
        counts = [q.shape[1] for q in queries]
        q = torch.cat(queries, dim=1).transpose(0, 1).contiguous().transpose(0, 1)[None]
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        out = torch.full((1, sum(counts), q.shape[1], self.values[0].shape[-1]), float("nan"), dtype=q.dtype)
        lens = torch.tensor(seen, dtype=torch.int32)
        tensors = out, q, self.k_cache, self.v_cache, self.table[seqs], lens, starts, sinks, slopes
        self.run(tensors, (window, chunk), (scale, softcap))
        return list(out[0].split(counts))

    def run(self, tensors, ints, floats):
        ops.paged_attention(*tensors, None, *ints, *floats)

    def reference(self, s, query, seen, sinks=None, window=0, scale=0.2, softcap=0.0, slopes=None, chunk=0):
        heads, n, _ = query.shape
        group = heads // len(self.keys[s])
        k = self.keys[s][:, :seen].double().repeat_interleave(group, 0)
        v = self.values[s][:, :seen].double().repeat_interleave(group, 0)
        scores = query.double() @ k.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rows, cols = torch.arange(seen - n, seen)[:, None], torch.arange(seen)[None]
        if slopes is not None:
            scores = scores + slopes.double()[:, None, None] * (cols - rows)
        hidden = (cols > rows) | ((cols <= rows - window) if window else False)
        hidden = hidden | ((cols // chunk != rows // chunk) if chunk else False)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, n, 1)], -1)
        return (scores.softmax(-1)[..., :seen] @ v).transpose(0, 1)


def make_queries(counts, heads=6, key_dim=32, dtype=torch.float32):
    gen = torch.Generator().manual_seed(5)
    return [torch.randn(heads, n, key_dim, generator=gen).to(dtype) for n in counts]
