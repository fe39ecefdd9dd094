"""AQLM checkpoints (Egiazarian et al.): sums of vectors of codebooks, for blocks of outputs and inputs.

    codes[N / out, K / in, C] int8 or int16: two's complement of indices in 0 .. 2^bits - 1
    codebooks[C, 2^bits, out, in]      scales[N / out, 1, 1, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fuseline.compile.quantization.published import Method, Published, Read, Tensors, check_shape

CODES, BOOKS, SCALES = ".codes", ".codebooks", ".scales"


def read(config: Mapping[str, Any]) -> Method:
    return Method("aqlm", (CODES, BOOKS, SCALES), _find)


def _find(module: str, tensors: Tensors, value: Read) -> Published | None:
    if CODES not in tensors:
        return None
    blocks, across, _ = tensors[CODES].shape
    _, size, rows, columns = tensors[BOOKS].shape
    check_shape(tensors, BOOKS, (tensors[CODES].shape[2], size, rows, columns), module)
    check_shape(tensors, SCALES, (blocks, 1, 1, 1), module)
    return Published(None, (blocks * rows, across * columns), _decode, {CODES: rows, SCALES: rows})


def _decode(tensors: Tensors) -> Tensor:
    codes, books = tensors[CODES].long(), tensors[BOOKS].float()
    total: Tensor | float = 0.0
    for index, book in zip(codes.unbind(-1), books, strict=True):
        total = total + book[index % len(book)]
    values = total * tensors[SCALES].float()
    return values.transpose(1, 2).flatten(0, 1).flatten(1)
