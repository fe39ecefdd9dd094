"""Tensors of one pool come zero, writable and apart from each other, and cost nothing until they are written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from fuseline.compile.memory import ALIGNMENT, CHUNK_BYTES, Pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 3, 1 << 18])
def test_zeros(rows: int, dtype: torch.dtype) -> None:
    made = Pages().zeros((rows, 2, 8), dtype)
    assert torch.equal(made, torch.zeros(rows, 2, 8, dtype=dtype)) and made.is_contiguous()
    made += 1
    assert made.sum() == made.numel() or dtype != torch.float32


def test_tensors_do_not_overlap() -> None:
    pages = Pages()
    sizes = [1, 100, 129, CHUNK_BYTES - 1000, 5000, CHUNK_BYTES + 1, 7]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda size: pages.zeros((size,), torch.uint8), sizes))
    places = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in made)
    assert all(end <= begin for (_, end), (begin, _) in zip(places[:-1], places[1:], strict=True))
    assert all(begin % ALIGNMENT == 0 for begin, _ in places)


def test_small_tensors_lie_side_by_side() -> None:
    pages = Pages()
    first, second = pages.zeros((640,), torch.uint8), pages.zeros((10,), torch.uint8)
    assert second.data_ptr() == first.data_ptr() + 640


def test_memory_is_taken_when_it_is_written_and_given_back_with_the_last_tensor() -> None:
    before = psutil.Process().memory_info().rss
    made = Pages().zeros((1 << 30,), torch.float32)
    assert psutil.Process().memory_info().rss - before < 16 << 20
    made[: 16 << 20] = 1.0
    assert psutil.Process().memory_info().rss - before >= 64 << 20
    del made
    assert psutil.Process().memory_info().rss - before < 16 << 20
