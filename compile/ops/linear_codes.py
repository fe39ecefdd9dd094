"""Linears whose weights are codes of 4, 5 or 8 bits. Legend: N outputs, K inputs, P = ceil(N / 16) panels, G groups.

Codes are stored as words[P, W, 16] int32: word w of an output holds its codes of 4 or 8 inputs, W = ceil(K / 4) or
ceil(K / 8). Those of 8 bits lie in the order of k; those of 4 bits as k = 0, 2, 4, 6, 1, 3, 5, 7 from the lowest on, so
that each half of a word has every second one. 32 codes of 5 bits are four such words of their lower bits and one of the
upper ones: bit 2 w + h of its byte b is of the code in half h of byte b of word w. Scales and zeros lie as [P, G, 16].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops.coded import CODE_TYPES, COUNTING_UP, KINDS, TABLES, code_values, scaled
from fuseline.compile.ops.library import Make, ModelShape, Workload, op

PANEL = 16
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
FIVES = 32
"""Codes of 5 bits in five words."""
UPPER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of a word of 4 bits each: the codes in its bytes' lower halves, then those in the upper ones."""
NAMES = {code: name for name, code in KINDS.items()}
EIGHT_BITS = (KINDS["int8"], KINDS["fp8"], KINDS["uint8"])


def num_words(num_in: int, bits: int) -> int:
    return -(-num_in // FIVES) * bits if bits == 5 else -(-num_in * bits // 32)


def bits_of(kind: str) -> int:
    """Bits of a stored code of one of KINDS."""
    return 8 if KINDS[kind] in EIGHT_BITS else 5 if kind.endswith("5") else 4


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K], of one byte each, as [N, W] int32; absent inputs are code 0."""
    if bits == 5:
        return _words_of_fives(F.pad(codes.view(torch.uint8), (0, -codes.shape[-1] % FIVES)))
    values = F.pad(codes.view(torch.uint8), (0, -codes.shape[-1] % (32 // bits)))
    if bits == 4:
        nibbles = values.unflatten(-1, (-1, 8))[..., NIBBLES]
        values = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).flatten(-2)
    return values.contiguous().view(torch.int32)


def _words_of_fives(values: Tensor) -> Tensor:
    low = to_words(values & 15, 4).unflatten(-1, (-1, 4))
    upper = (values >> 4).unflatten(-1, (-1, 4, 8))[..., UPPER].unflatten(-1, (2, 4)).flatten(-3, -2)
    places = torch.arange(8, dtype=torch.uint8, device=values.device).unsqueeze(-1)
    high = (upper << places).sum(-2, dtype=torch.uint8).contiguous().view(torch.int32)
    return torch.cat((low, high), -1).flatten(-2)


def _from_words_of_fives(words: Tensor) -> Tensor:
    units = words.unflatten(-1, (-1, 5))
    low = from_words(units[..., :4].flatten(-2), 4)
    places = torch.arange(8, dtype=torch.uint8, device=words.device).unsqueeze(-1)
    # A dim of 1 may have any stride and still be contiguous.
    high = units[..., 4:].clone(memory_format=torch.contiguous_format).view(torch.uint8)
    upper = high.unsqueeze(-2) >> places & 1
    upper = upper.unflatten(-2, (4, 2)).flatten(-2)[..., [UPPER.index(k) for k in range(8)]]
    return low | upper.flatten(-3) << 4


def from_words(words: Tensor, bits: int) -> Tensor:
    """[..., W] int32 -> [..., K] uint8, K rounded up."""
    if bits == 5:
        return _from_words_of_fives(words)
    values = words.contiguous().view(torch.uint8)
    if bits == 8:
        return values
    nibbles = torch.stack((values & 15, values >> 4), -1).flatten(-2).unflatten(-1, (-1, 8))
    return nibbles[..., [NIBBLES.index(k) for k in range(8)]].flatten(-2)


def to_panels(rows: Tensor) -> Tensor:
    """[N, X] -> [P, X, 16], zero padded."""
    panels = -(-len(rows) // PANEL)
    return F.pad(rows, (0, 0, 0, panels * PANEL - len(rows))).unflatten(0, (panels, PANEL)).mT.contiguous()


def from_panels(panels: Tensor, num_rows: int) -> Tensor:
    """The inverse of to_panels."""
    return panels.mT.flatten(0, 1)[:num_rows]


def values_of(words: Tensor, kind: int, like: Tensor) -> Tensor:
    """[..., W] int32 -> the codes' values [..., K], K rounded up: in the dtype of a float64 `like`, else float32.

    Tables are rounded to the dtype of `like`: it is what kernels multiply.
    """
    name = NAMES[kind]
    codes = from_words(words, bits_of(name))
    codes = codes.view(CODE_TYPES[name]) if kind in EIGHT_BITS else codes
    values = code_values(codes, name)
    values = values.to(like.dtype).float() if name in TABLES else values
    return values.to(wide(like))


def wide(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def linear_codes_inputs(make: Make) -> Iterator[tuple]:
    """Every kind, few and many rows, groups and rows, N and K that fill no panel and no word."""
    for kind, group, rows, num_out, num_in, has_zeros, has_bias in (
        ("int8", 0, 1, 33, 75, False, True), ("int8", 32, 3, 33, 96, True, False),
        ("int8", 128, 40, 70, 1100, False, True), ("fp8", 0, 2, 20, 64, False, False),
        ("fp8", 128, 19, 48, 300, False, False), ("int4", 32, 1, 33, 75, True, True),
        ("int4", 128, 5, 70, 1152, False, False), ("int4", 0, 33, 16, 40, False, True),
        ("int4", 64, 30, 96, 640, True, False), ("nf4", 64, 1, 32, 128, False, False),
        ("nf4", 64, 17, 33, 640, False, False), ("fp4", 64, 3, 16, 128, False, False),
        ("e2m1", 32, 4, 48, 96, False, False), ("e2m1", 32, 21, 16, 544, False, False),
        ("iq4nl", 32, 2, 33, 96, False, False), ("uint4", 32, 1, 33, 96, True, True),
        ("uint4", 16, 20, 48, 544, True, False), ("uint8", 32, 3, 33, 96, True, False),
        ("uint8", 0, 18, 16, 75, True, True), ("int5", 32, 1, 33, 96, False, True),
        ("int5", 0, 4, 70, 1100, False, False), ("int5", 64, 21, 48, 640, True, False),
        ("uint5", 32, 3, 33, 96, True, True), ("uint5", 32, 40, 48, 544, True, False),
    ):  # fmt: skip
        codes, scales, zeros = random_weight(make, kind, group, num_out, num_in, has_zeros)
        order = make.order(num_in) if kind == "int4" and group == 32 else None
        bias = make.normal(num_out) if has_bias else None
        x = make.normal(1, rows, num_in)
        yield x, codes, scales, zeros, order, bias, num_out, group, KINDS[kind]


def random_weight(make: Make, kind: str, group: int, num_out: int, num_in: int, has_zeros: bool) -> tuple:
    """(codes, scales, zeros) in panels; products with a normal x are about 1."""
    bits = bits_of(kind)
    codes = make.ids(32 if kind == "uint8" else 1 << bits, num_out, num_in).to(torch.uint8).cpu()
    if kind == "fp8":
        codes = torch.where(codes & 127 == 127, codes - 1, codes)
    spread = {"int8": 74.0, "fp8": 150.0, "int4": 4.6, "e2m1": 2.5, "iq4nl": 67.0, "uint4": 4.6}
    size = (9.2 if bits == 5 or kind == "uint8" else spread.get(kind, 0.5)) * num_in**0.5
    groups = -(-num_in // group) if group else 1
    scales = (1 + make.normal(num_out, groups).abs()) / size
    zeros = make.ids(5, num_out, groups).to(scales.dtype) - 2 if has_zeros else None
    if kind in COUNTING_UP:
        zeros = -scales * ((16 if kind == "uint4" else 32) / 2 + zeros)
    words = to_panels(to_words(codes, bits)).to(make.device)
    return words, to_panels(scales), None if zeros is None else to_panels(zeros)


def linear_codes_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """The largest linear of a layer, in int4 with groups of 32 and in int8 with groups of 128."""
    num_in, num_out = shape.hidden_size, 2 * shape.intermediate_size
    for kind, bits, group in (("int4", 4, 32), ("int8", 8, 128)):
        words = torch.zeros(num_out // PANEL, num_words(num_in, bits), PANEL, dtype=torch.int32, device=make.device)
        scales = make.fill(num_out // PANEL, -(-num_in // group), PANEL)
        for tokens in make.tokens:
            args = (make.fill(1, tokens, num_in), words, scales, None, None, None, num_out, group, KINDS[kind])
            yield Workload(f"{kind} {tokens} x {num_in} -> {num_out}", args, flops=2 * tokens * num_in * num_out)


@op(
    fake=lambda x, codes, scales, zeros, order, bias, num_out, group, kind: x.new_empty(*x.shape[:-1], num_out),
    inputs=linear_codes_inputs,
    tolerance=24.0,
    workloads=linear_codes_workloads,
    weights=("codes", "scales", "zeros", "order", "bias"),
    is_product=True,
    by_reference=True,
)
def linear_codes(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bias: Tensor | None,
    num_out: int, group: int, kind: int,
) -> Tensor:  # fmt: skip
    """x[..., K] times a weight of codes -> [..., N]; fp32, rounded once. `order`: input j of the weight is x[order[j]].

    Within a group, codes' values are multiplied and summed; the sum is scaled. So values need not be rounded. Kernels
    for processors with fast products of integers round inputs of half precision to 15 bits of their group's largest.
    """
    x32 = x.to(wide(x)) if order is None else x.to(wide(x))[..., order]
    values = values_of(from_panels(codes, num_out), kind, x)[:, : x.shape[-1]]
    zeros = None if zeros is None else from_panels(zeros, num_out)
    weight = scaled(values, from_panels(scales, num_out), zeros, group, NAMES[kind])
    return F.linear(x32, weight, None if bias is None else bias.to(wide(x))).to(x.dtype)


def embedding_codes_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """The embedding of a vocabulary in int8 with groups of 128."""
    num_in, group = shape.hidden_size, 128
    num_panels = shape.vocab_size // PANEL
    words = torch.zeros(num_panels, num_words(num_in, 8), PANEL, dtype=torch.int32, device=make.device)
    scales = make.fill(num_panels, -(-num_in // group), PANEL)
    for tokens in make.tokens:
        args = make.ids(num_panels * PANEL, 1, tokens), words, scales, None, num_in, group, KINDS["int8"], scales.dtype
        yield Workload(f"{tokens} x {num_in}", args, num_bytes=tokens * num_in)


@op(
    fake=lambda ids, codes, scales, zeros, num_in, group, kind, dtype: scales.new_empty(
        *ids.shape, num_in, dtype=dtype
    ),
    inputs=lambda make: [
        (make.ids(33, 1, 6), *random_weight(make, kind, 32, 33, 72, has_zeros), 72, 32, KINDS[kind], make.dtype)
        for kind, has_zeros in (
            ("int8", False), ("int4", True), ("iq4nl", False), ("uint4", True), ("uint8", True), ("int5", False),
            ("uint5", True),
        )
    ],
    workloads=embedding_codes_workloads,
    weights=("codes", "scales", "zeros"),
    sums=False,
    by_reference=True,
)
def embedding_codes(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, num_in: int, group: int, kind: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The rows `ids` of a weight of codes -> [..., K] of `dtype`."""
    panel, lane = ids // PANEL, ids % PANEL
    rows = [None if part is None else part[panel, :, lane] for part in (codes, scales, zeros)]
    values = values_of(rows[0], kind, scales.new_empty(0, dtype=dtype))[..., :num_in]
    return scaled(values, rows[1], rows[2], group, NAMES[kind]).to(dtype)
