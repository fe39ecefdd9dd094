"""Batches for the CUDA attention kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import cuda_emulator
import torch
from fake_gpu import GPU
from triton_attention_cases import NAN, Batch

from fuseline.compile.kernels.cuda import attention
from fuseline.compile.kernels.registry import OpCall
from fuseline.compile.ops.registry import registry

LAUNCHES = {"threads": {}, "bulk": {"is_bulk": True, "run": 1}, "bulk runs": {"is_bulk": True, "run": attention.RUN}}
"""Kernels of decode attention, as decode_attention is told to launch them."""


class Decode(Batch):
    """One token of each sequence, by a CUDA kernel: `launch` says which."""

    launch: Mapping[str, object] = LAUNCHES["threads"]

    def __init__(self, lengths, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, counts=None, **more):
        super().__init__(lengths, counts or [1] * len(lengths), heads, kv_heads, dim, dim, dtype=dtype, **more)

    def run(self, seqs=None, window=0, scale=0.3, softcap=0.0, sinks=None, **more):
        seqs = range(len(self.lengths)) if seqs is None else seqs
        out, args = self.arguments(seqs, sinks)
        supports = attention.supports_bulk if self.launch else attention.supports_attention
        assert supports(*args)
        cuda_emulator.run(attention.decode_attention, out, *args, window, scale, softcap, **{**self.launch, **more})
        return list(out[0].split([self.counts[s] for s in seqs]))

    def arguments(self, seqs, sinks):
        """An output of NaNs, and the op's arguments up to the sinks, for some sequences."""
        q = torch.cat([self.queries[s] for s in seqs])[None].transpose(1, 2)
        out = torch.full((1, q.shape[2], q.shape[1], q.shape[3]), NAN, dtype=q.dtype)
        starts = torch.tensor([0, *(self.counts[s] for s in seqs)]).cumsum(0).int()
        lengths = torch.tensor([self.lengths[s] for s in seqs]).int()
        return out, (q, self.k_cache, self.v_cache, self.table[list(seqs)], lengths, starts, _cast(sinks, q.dtype))

    def check(self, tolerance=None, **options):
        super().check(2 * torch.finfo(self.queries[0].dtype).eps if tolerance is None else tolerance, **options)


class Prompts(Decode):
    """The last `counts` tokens of each sequence, by the kernel of prompts, which leaves single tokens alone."""

    def __init__(self, lengths, counts=None, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, **more):
        super().__init__(lengths, heads, kv_heads, dim, dtype, list(counts or lengths), **more)

    def run(self, seqs=None, window=0, scale=0.3, softcap=0.0, sinks=None):
        seqs = range(len(self.lengths)) if seqs is None else seqs
        out, args = self.arguments(seqs, sinks)
        assert attention.supports_prefill(*args, window, scale, softcap)
        cuda_emulator.run(attention.prefill_attention, out, *args, window, scale, softcap)
        return list(out[0].split([self.counts[s] for s in seqs]))


def _cast(sinks, dtype):
    return None if sinks is None else sinks.to(dtype)


def llama_call(num_tokens: int, isa: str) -> OpCall:
    """A call of the op by a sequence of the 8B Llama, on a GPU of that architecture; tensors are on meta."""
    half = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    ints = [torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1, 256), (1,), (2,))]
    args = (half(1, 32, num_tokens, 128), *(half(300, 8, 16, 128) for _ in "kv"), *ints, None, 0, 0.1, 0.0)
    return OpCall(registry()["paged_attention"].target, args, replace(GPU, isa=isa))
