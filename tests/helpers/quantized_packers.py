"""Published layouts of packages that do not run without a GPU, or that bring too much: packed by hand, value by value.

Each writer takes one weight [N, K] and gives (published tensors by suffix, dequantized weight), like those of
quantized.py. They go from a weight to its tensors as the formats are defined, with loops; readers go the other way.
"""

from __future__ import annotations

import torch
from quantized import GROUP, VALUES, Case, Write, Written, compressed, fp8, gptq, integers, words
from torch import Tensor

SIGNS_OF_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def marlin_permutation(bits: int, is_sparse: bool = False, for_int8: bool = False) -> list[int]:
    """Of 1024 weights of a row of tiles, the one that is packed at each place; after Marlin's _get_perms, get_perms_24
    of its sparse version, and QQQ's own."""
    order = []
    for thread in range(32):
        first = []
        column = thread // 4
        for block in (0, 1):
            base = 4 * (thread % 4)
            rows = [2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1]
            for row in [base, base + 1, base + 2, base + 3] if for_int8 else rows:
                if is_sparse:
                    first.append(16 * row + column // 2 * 256 + 8 * (column % 2) + 4 * block)
                else:
                    first.append(16 * row + column + 8 * block)
        for j in range(4):
            order += [place + (1 if is_sparse else 256) * j for place in first]
    return order


def interleaved(order: list[int], within: tuple[int, ...]) -> list[int]:
    return [order[at + j] for at in range(0, len(order), len(within)) for j in within]


def tiled(codes: Tensor, order: list[int]) -> Tensor:
    """[K, N] -> [K / 16, 16 N], permuted."""
    num_in, num_out = codes.shape
    tiles = codes.reshape(num_in // 16, 16, num_out // 16, 16).permute(0, 2, 1, 3).reshape(num_in // 16, num_out * 16)
    return tiles.reshape(-1, len(order))[:, order].reshape(tiles.shape)


def permuted_scales(scales: Tensor) -> Tensor:
    """[G, N] as Marlin's kernels read them."""
    if len(scales) > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in [0, 1, 8, 9, 16, 17, 24, 25]]
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape)


def marlin(weight: Tensor) -> Written:
    codes, scales, _ = integers(weight, 4, True, GROUP)
    order = interleaved(marlin_permutation(4), (0, 2, 4, 6, 1, 3, 5, 7))
    plain = (codes - 8).float() * scales.float().repeat_interleave(GROUP, 1)
    stored = {".B": words(tiled(codes.T, order), 4), ".s": permuted_scales(scales.T.contiguous())}
    return stored | {".workspace": torch.zeros(64, dtype=torch.int32)}, plain


def metadata(kept: Tensor) -> Tensor:
    """[N, K / 4, 2] places in each four -> [K / 32, 2 N] int16: 16 bits for four of them, reordered as by reorder_meta
    in the utilities of Marlin's sparse version (marlin_utils_test_24.py of vLLM)."""
    num_out, fours, _ = kept.shape
    columns = fours // 4
    stored = [0] * (num_out * columns)
    for row in range(num_out):
        for column in range(columns):
            pairs_of_bits = kept[row, 4 * column : 4 * column + 4].flatten().tolist()
            word = sum(place << (2 * j) for j, place in enumerate(pairs_of_bits))
            to_row = row // 64 * 64 + (row % 2) * 2 + (row % 8) // 4 + (row % 32 % 4) // 2 * 32 + (row % 64) // 8 * 4
            to_column = column
            if to_row % 2 == 0 and to_column % 2 == 1:
                to_row, to_column = to_row + 1, to_column - 1
            elif to_row % 2 == 1 and to_column % 2 == 0:
                to_row, to_column = to_row - 1, to_column + 1
            at = (to_column // 2) * num_out * 2 + to_row * 2 + to_column % 2
            stored[at] = word - (1 << 16) if word >= 1 << 15 else word
    return torch.tensor(stored, dtype=torch.int16).reshape(columns // 2, num_out * 2)


def marlin_24(bits: int, is_compressed: bool = False) -> Write:
    """Two of four inputs are kept."""

    def write(weight: Tensor) -> Written:
        fours = weight.unflatten(1, (-1, 4))
        kept = fours.abs().argsort(-1, descending=True)[..., :2].sort(-1).values
        weight = torch.zeros_like(fours).scatter(-1, kept, fours.gather(-1, kept)).flatten(1)
        codes, scales, _ = integers(weight, bits, True, GROUP)
        half = 1 << (bits - 1)
        sparse = codes.unflatten(1, (-1, 4)).gather(-1, kept).flatten(1)
        within = (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else (0, 2, 1, 3)
        order = interleaved(marlin_permutation(bits, is_sparse=True), within)
        of_scales = [8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]
        scale = scales.T.reshape(-1, 64)[:, of_scales].reshape(scales.T.shape)
        packed, meta = words(tiled(sparse.T, order), bits), metadata(kept)
        names = (".weight_packed", ".meta", ".scale_packed") if is_compressed else (".B_24", ".B_meta", ".s")
        plain = (codes - half).float() * scales.float().repeat_interleave(GROUP, 1)
        return dict(zip(names, (packed, meta, scale), strict=True)), plain

    return write


def qqq(has_groups: bool) -> Write:
    """After qqq_quantize_weights of its tests: scales of channels, and of groups in units of these."""

    def write(weight: Tensor) -> Written:
        order = marlin_permutation(4, for_int8=True)
        if not has_groups:
            channel = weight.abs().amax(1, keepdim=True) / 7
            codes = (weight / channel).round().clamp(-7, 7)
            packed = words(tiled((codes.long() & 15).T, interleaved(order, (4, 0, 5, 1, 6, 2, 7, 3))), 4)
            stored = {".B": packed, ".s_channel": permuted_scales((channel / 16).T.contiguous())}
            return stored | {".s_group": torch.empty(0, dtype=torch.float16)}, codes * channel
        codes, groups, _ = integers(weight, 4, True, GROUP)
        channel = ((codes - 8) * groups.float().repeat_interleave(GROUP, 1)).abs().amax(1, keepdim=True) / 127
        groups = (groups.float() / channel).half()
        wide = ((codes - 8).half() * groups.repeat_interleave(GROUP, 1)).round().clamp(-128, 127)
        packed = words(tiled(codes.T, interleaved(order, (0, 2, 4, 6, 1, 3, 5, 7))), 4)
        stored = {".B": packed, ".s_channel": permuted_scales(channel.T.contiguous())}
        return stored | {".s_group": permuted_scales(groups.T.contiguous())}, wide.float() * channel

    return write


def hqq(bits: int, axis: int = 1) -> Write:
    """As hqq.core.bitpack packs, with the meta of HQQLinear as tensors."""

    def write(weight: Tensor) -> Written:
        parts = weight.reshape(-1, GROUP) if axis else weight.reshape(GROUP, -1)
        low, high = parts.amin(axis, keepdim=True), parts.amax(axis, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half()
        zero = (-low / scale.float()).half()
        codes = (parts / scale.float() + zero.float()).round().clamp(0, 2**bits - 1).int()
        plain = ((codes.float() - zero.float()) * scale.float()).reshape(weight.shape)
        per = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
        rows = -(-len(codes) // per)
        padded = torch.zeros(rows * per, codes.shape[1], dtype=torch.int32)
        padded[: len(codes)] = codes
        packed = torch.zeros(rows, codes.shape[1], dtype=torch.int32)
        for part in range(per):
            packed |= padded[part * rows : (part + 1) * rows] << (bits * (per - 1 - part))
        stored = {".W_q": packed if bits == 3 else packed.to(torch.uint8), ".scale": scale, ".zero": zero}
        numbers = {".nbits": bits, ".group_size": GROUP, ".axis": axis}
        stored |= {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
        return stored | {".shape": torch.tensor(weight.shape), ".quant_scale": torch.tensor(0)}, plain

    return write


def aqlm(num_books: int, bits: int, rows: int = 1, columns: int = 8) -> Write:
    """Codebooks of the weight's own blocks: the first holds what each block is nearest to, the next what is left."""

    def write(weight: Tensor) -> Written:
        num_out, num_in = weight.shape
        blocks = weight.reshape(num_out // rows, rows, num_in // columns, columns).transpose(1, 2)
        scales = blocks.abs().amax((1, 2, 3), keepdim=True).half()
        left = (blocks / scales.float()).reshape(-1, rows * columns)
        books, codes = [], []
        for _ in range(num_books):
            picked = torch.randperm(len(left), generator=torch.Generator().manual_seed(0))[: 2**bits]
            book = torch.zeros(2**bits, rows * columns)
            book[: len(picked)] = left[picked]
            nearest = torch.cdist(left, book).argmin(1)
            left = left - book[nearest].half().float()
            books.append(book.half())
            codes.append(nearest)
        signed = torch.stack(codes, -1)
        signed = torch.where(signed >= 2 ** (bits - 1), signed - 2**bits, signed)
        shape = num_out // rows, num_in // columns
        stored = {
            ".codes": signed.reshape(*shape, num_books).to(torch.int8 if bits <= 8 else torch.int16),
            ".codebooks": torch.stack(books).reshape(num_books, 2**bits, rows, columns), ".scales": scales,
        }  # fmt: skip
        total = sum(book.float()[code] for book, code in zip(books, codes, strict=True))
        values = total.reshape(*shape, rows, columns) * scales.float()
        return stored, values.transpose(1, 2).reshape(num_out, num_in)

    return write


def quark(dtype: str, scheme: str) -> Write:
    def write(weight: Tensor) -> Written:
        bits, signed = int(dtype.removeprefix("u").removeprefix("int")), not dtype.startswith("u")
        group = GROUP if scheme == "per_group" else weight.shape[1]
        whole = weight.reshape(1, -1) if scheme == "per_tensor" else weight
        codes, scales, zeros = integers(whole, bits, signed, whole.shape[1] if scheme == "per_tensor" else group)
        scales = scales.float()
        spread = group if scheme == "per_group" else whole.shape[1]
        plain = ((codes - zeros.repeat_interleave(spread, 1)) * scales.repeat_interleave(spread, 1)).view_as(weight)
        half = (1 << (bits - 1)) if signed else 0
        codes, zeros = codes.view_as(weight) - half, zeros - half
        if scheme == "per_group":
            codes, zeros, scales = codes.T, zeros.T, scales.T
        else:
            zeros, scales = zeros.flatten(), scales.flatten()
        if bits == 4:
            order = (0, 4, 1, 5, 2, 6, 3, 7)
            codes, zeros = words(codes & 15, 4, order), words(zeros & 15, 4, order) if zeros.numel() > 1 else zeros[0]
        elif signed:
            codes, zeros = codes.to(torch.int8), zeros.to(torch.int8)
        else:
            codes, zeros = codes.to(torch.uint8), zeros.to(torch.uint8)
        if scheme == "per_tensor":
            scales, zeros = scales.reshape(()), zeros.reshape(())
        return {".weight": codes, ".weight_scale": scales, ".weight_zero_point": zeros}, plain

    return write


def codes_of_e2m1(values: Tensor) -> Tensor:
    return (values.abs().unsqueeze(-1) - SIGNS_OF_E2M1).abs().argmin(-1) + 8 * (values < 0)


def pairs(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def nvfp4(weight: Tensor) -> Written:
    """As modelopt's NVFP4QTensor: scales of 16 inputs in fp8, in units of one float for all."""
    whole = weight.abs().amax() / (6 * 448)
    parts = weight.unflatten(1, (-1, 16))
    scales = (parts.abs().amax(-1) / (6 * whole)).clamp(min=2**-9, max=448).to(torch.float8_e4m3fn)
    each = (scales.float() * whole).unsqueeze(-1)
    codes = codes_of_e2m1(parts / each).flatten(1)
    values = (SIGNS_OF_E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)).unflatten(1, (-1, 16))
    return {".weight": pairs(codes), ".weight_scale": scales, ".weight_scale_2": whole}, (values * each).flatten(1)


def fp4(weight: Tensor) -> Written:
    """Quark's MXFP4: exponents of 32 inputs."""
    parts = weight.unflatten(1, (-1, 32))
    exponents = torch.log2(parts.abs().amax(-1).clamp(min=1e-30) / 6).ceil().clamp(-127, 127)
    each = torch.exp2(exponents).unsqueeze(-1)
    codes = codes_of_e2m1(parts / each).flatten(1)
    values = (SIGNS_OF_E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)).unflatten(1, (-1, 32))
    return {".weight": pairs(codes), ".weight_scale": (exponents + 127).to(torch.uint8)}, (values * each).flatten(1)


def fp8_blocks_4d(weight: Tensor) -> Written:
    """As modelopt writes FP8_PB_WO: scales [N / block, 1, K / block, 1]."""
    blocks = weight.reshape(weight.shape[0] // GROUP, GROUP, weight.shape[1] // GROUP, GROUP)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    values = (blocks / scales).to(torch.float8_e4m3fn)
    plain = (values.float() * scales).reshape(weight.shape)
    return {".weight": values.reshape(weight.shape), ".weight_scale": scales}, plain


def deepspeed_float(value: float, exponent_bits: int, mantissa_bits: int) -> float:
    """The float that DeepSpeed's quantizer makes of one scaled value, by arithmetic instead of bits."""
    if value == 0:
        return 0.0
    sign, size = (-1.0 if value < 0 else 1.0), abs(value)
    exponent = int(torch.tensor(size, dtype=torch.float64).log2().floor())
    exponent -= 2.0**exponent > size
    unit = 2.0 ** (exponent - mantissa_bits)
    rounded = int(size / unit + 0.5) * unit  # half away from zero
    return sign * max(rounded, 2.0 ** (2 - 2 ** (exponent_bits - 1)))


def deepspeed(bits: int) -> Write:
    """Plain weights: the quantizer rounds them as they are loaded, here in groups of GROUP."""
    exponent, mantissa, largest = {6: (3, 2, 28.0), 8: (4, 3, 480.0), 12: (7, 4, 510.0)}[bits]

    def write(weight: Tensor) -> Written:
        rows = []
        for part in weight.reshape(-1, GROUP):
            scale = part.abs().max() / largest
            scaled = (part * (largest / part.abs().max())).tolist()
            rows.append(torch.tensor([deepspeed_float(value, exponent, mantissa) for value in scaled]) * scale)
        return {".weight": weight}, torch.cat(rows).view_as(weight)

    return write


def cases() -> dict[str, Case]:
    """One for each way to publish weights; those of quantized.cases are beside them."""
    int4, zeros = f"int4/{GROUP}/float16", f"int4/{GROUP}/float32/zeros"
    gptq_config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    auto = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": True, "data_type": "int"}
    modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    even = ("q_proj.weight", "o_proj.weight", "down_proj.weight")

    def of_quark(dtype: str, scheme: str) -> dict:
        weight = {"dtype": dtype, "qscheme": scheme, "group_size": GROUP, "is_dynamic": False}
        export = {"pack_method": "reorder"}
        return {"quant_method": "quark", "global_quant_config": {"weight": weight}, "export": export}

    def of_hqq(bits: int, axis: int = 1) -> dict:
        params = {"nbits": bits, "group_size": GROUP, "axis": axis}
        return {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}, "skip_modules": ["lm_head"]}

    aqlm_config = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "nbits_per_codebook": 8}
    marlin_24_config = gptq_config | {"checkpoint_format": "marlin_24"}
    sparse = compressed(4, "int", "group", "pack-quantized").config | {"format": "marlin-24"}
    deepspeed_config = {"quant_method": "deepspeedfp", "group_size": GROUP}
    return {
        "gptq-2bit": Case(gptq_config | {"bits": 2, "sym": False}, gptq(2, symmetric=False), f"{int4}/zeros"),
        "gptq-3bit": Case(gptq_config | {"bits": 3, "sym": False}, gptq(3, symmetric=False), f"{int4}/zeros",
                          writes_tokens=False),
        "auto-round": Case(auto | {"packing_format": "auto_round:auto_gptq"}, gptq(), int4),
        "auto-round-v2": Case(auto | {"packing_format": "auto_round", "sym": False}, gptq(symmetric=False, less=0),
                              f"{int4}/zeros", writes_tokens=False),
        "marlin": Case(gptq_config | {"is_marlin_format": True}, marlin, int4),
        "marlin-24": Case(marlin_24_config, marlin_24(4), int4, even),
        "marlin-24-8bit": Case(marlin_24_config | {"bits": 8}, marlin_24(8), f"int8/{GROUP}/float16", even, False),
        "ct-marlin-24": Case(sparse, marlin_24(4, is_compressed=True), int4, even, False),
        "qqq": Case({"quant_method": "qqq", "wbits": 4, "group_size": -1}, qqq(False), "int4/row/float32"),
        "qqq-groups": Case({"quant_method": "qqq", "wbits": 4, "group_size": GROUP}, qqq(True), "int8/row/float32"),
        "hqq": Case(of_hqq(4), hqq(4), zeros),
        "hqq-axis0": Case(of_hqq(4, 0), hqq(4, 0), VALUES),
        "hqq-8bit": Case(of_hqq(8), hqq(8), f"int8/{GROUP}/float32/zeros", writes_tokens=False),
        "hqq-3bit": Case(of_hqq(3), hqq(3), zeros, writes_tokens=False),
        "hqq-2bit": Case(of_hqq(2), hqq(2), zeros, writes_tokens=False),
        "hqq-1bit": Case(of_hqq(1), hqq(1), zeros, writes_tokens=False),
        "aqlm-2x8": Case(aqlm_config, aqlm(2, 8), VALUES),
        "aqlm-1x16": Case(aqlm_config, aqlm(1, 12, rows=2), VALUES, writes_tokens=False),
        "quark-int4": Case(of_quark("int4", "per_group"), quark("int4", "per_group"), zeros),
        "quark-uint4": Case(of_quark("uint4", "per_group"), quark("uint4", "per_group"), zeros, writes_tokens=False),
        "quark-int8": Case(of_quark("int8", "per_channel"), quark("int8", "per_channel"), "int8/row/float32/zeros"),
        "quark-int8-groups": Case(of_quark("int8", "per_group"), quark("int8", "per_group"),
                                  f"int8/{GROUP}/float32/zeros", writes_tokens=False),
        "quark-uint8-tensor": Case(of_quark("uint8", "per_tensor"), quark("uint8", "per_tensor"),
                                   "int8/row/float32/zeros", writes_tokens=False),
        "quark-int4-channel": Case(of_quark("int4", "per_channel"), quark("int4", "per_channel"),
                                   "int4/row/float32/zeros", writes_tokens=False),
        "quark-fp8": Case(of_quark("fp8_e4m3", "per_tensor"), fp8, "fp8/row/float32", writes_tokens=False),
        "quark-fp4": Case(of_quark("fp4", "per_group"), fp4, "lut4/32/float32/e2m1", writes_tokens=False),
        "modelopt-fp8": Case(modelopt | {"quant_algo": "FP8"}, fp8, "fp8/row/float32", writes_tokens=False),
        "modelopt-fp8-blocks": Case(modelopt | {"quant_algo": "FP8_PB_WO", "weight_block_size": [GROUP, GROUP]},
                                    fp8_blocks_4d, f"fp8/{GROUP}/float32", writes_tokens=False),
        "nvfp4": Case(modelopt, nvfp4, "lut4/16/float32/e2m1"),
        **{f"deepspeedfp-{bits}": Case(deepspeed_config | {"bits": bits}, deepspeed(bits), VALUES,
                                       writes_tokens=bits == 6) for bits in (6, 8, 12)},
    }  # fmt: skip
