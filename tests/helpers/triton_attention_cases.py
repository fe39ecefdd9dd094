"""Batches with a KV cache for the Triton attention kernels."""

from __future__ import annotations

import torch

from fuseline.compile.kernels.triton import attention

NAN = float("nan")

SOFTCAP, SINKS = {"softcap": 3.0}, {"sinks": torch.linspace(-2, 3, 4)}
SLOPES, CHUNKS = {"slopes": torch.tensor([0.5, 0.1, 0.0, 1.0])}, {"chunk": 50, "slopes": torch.tensor([0.5, 0.1])}


class Batch:
    """Sequences of random keys and values in a cache of shuffled blocks. What no row may read is NaN or no block."""

    def __init__(self, lengths, counts, heads=4, kv_heads=2, key_dim=16, value_dim=16, block_size=16,
                 dtype=torch.float32, cache_dtype=None):  # fmt: skip
        gen = torch.Generator().manual_seed(1)

        def randn(*shape, to=dtype):
            return torch.randn(*shape, generator=gen).to(to)

        cache_dtype = cache_dtype or dtype
        self.lengths, self.counts = lengths, counts
        self.keys = [randn(kv_heads, n, key_dim, to=cache_dtype) for n in lengths]
        self.values = [randn(kv_heads, n, value_dim, to=cache_dtype) for n in lengths]
        self.queries = [randn(n, heads, key_dim) for n in counts]
        per_seq = [-(-n // block_size) for n in lengths]
        order = torch.randperm(sum(per_seq) + 2, generator=gen).int()
        self.k_cache, self.v_cache = (
            torch.full((sum(per_seq) + 2, kv_heads, block_size, d), NAN).to(cache_dtype) for d in (key_dim, value_dim)
        )
        self.table = torch.full((len(lengths), max(1, *per_seq)), 10**6, dtype=torch.int32)
        for s, blocks in enumerate(order[: sum(per_seq)].split(per_seq)):
            self.table[s, : len(blocks)] = blocks
            at, within = blocks[torch.arange(lengths[s]) // block_size].long(), torch.arange(lengths[s]) % block_size
            self.k_cache[at, :, within] = self.keys[s].transpose(0, 1)
            self.v_cache[at, :, within] = self.values[s].transpose(0, 1)

    def run(self, seqs=None, window=0, scale=0.3, softcap=0.0, sinks=None, **more):
        """One [n, H, E] for each of the sequences asked for."""
        seqs = range(len(self.lengths)) if seqs is None else seqs
        counts = [self.counts[s] for s in seqs]
        q = torch.cat([self.queries[s] for s in seqs])
        out = torch.full((1, *q.shape[:2], self.v_cache.shape[3]), NAN, dtype=q.dtype)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        lengths = torch.tensor([self.lengths[s] for s in seqs]).int()
        attention.paged_attention(
            out, q[None].transpose(1, 2), self.k_cache, self.v_cache, self.table[list(seqs)], lengths, starts, sinks,
            window, scale, softcap, **more,
        )  # fmt: skip
        return list(out[0].split(counts))

    def reference(self, s, window=0, scale=0.3, softcap=0.0, sinks=None, slopes=None, chunk=0):
        q, k, v = self.queries[s].transpose(0, 1).double(), self.keys[s].double(), self.values[s].double()
        group = q.shape[0] // k.shape[0]
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        rows = torch.arange(self.lengths[s] - self.counts[s], self.lengths[s])[:, None]
        keys = torch.arange(self.lengths[s])[None]
        if slopes is not None:
            scores = scores + slopes.double()[:, None, None] * (keys - rows)
        scores = scores.masked_fill((keys > rows) | ((keys <= rows - window) if window else keys < 0), -torch.inf)
        scores = scores.masked_fill((keys // chunk != rows // chunk) if chunk else keys < 0, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:2], 1)), -1)
        weights = scores.softmax(-1)[..., : keys.shape[1]]
        return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)

    def check(self, tolerance=3e-6, **options):
        for s, found in enumerate(self.run(**options)):
            torch.testing.assert_close(found.double(), self.reference(s, **options), rtol=tolerance, atol=tolerance)
