"""Blocks of a KV cache between GPU memory and pinned host memory, which kernels read and write too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 1024  # of 8 bytes, that a program copies


def copy_blocks(target: Tensor, source: Tensor, to: Tensor, blocks: Tensor) -> None:
    """target[to[i]] = source[blocks[i]]: caches [N, K, B, D] of one dtype, contiguous; to and blocks [n >= 1] int64.

    No block is written twice. B is a multiple of 8.
    """
    target, source = (cache.flatten(1).view(torch.int64) for cache in (target, source))
    num_words = target.shape[1]
    copy_kernel[(to.shape[0], triton.cdiv(num_words, WORDS))](
        target, source, to, blocks, NUM_WORDS=num_words, SIZE=WORDS, num_warps=4
    )


@triton.jit
def copy_kernel(target, source, to, blocks, NUM_WORDS: tl.constexpr, SIZE: tl.constexpr):
    """Program (block, SIZE words of it)."""
    i = tl.program_id(0)
    word = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = word < NUM_WORDS
    value = tl.load(source + tl.load(blocks + i) * NUM_WORDS + word, mask=there)
    tl.store(target + tl.load(to + i) * NUM_WORDS + word, value, mask=there)
