"""Quantized checkpoints of the zoo's models, and the plain weights that each of them stands for.

A writer takes one weight [N, K] and gives its published tensors by suffix, with the weight's dequantized values as the
package that defines the format computes them; where none runs here, as the writer that packed the codes knows them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
VALUES = "None"
"""In place of a layout: the weight is dequantized as it is loaded."""
Written = tuple[dict[str, Tensor], Tensor]
"""(published tensors by suffix, dequantized weight)."""
Write = Callable[[Tensor], Written]


class Case(NamedTuple):
    config: dict[str, Any]
    """quantization_config."""
    write: Write
    layout: str
    """Layout that the weights are read into."""
    ends: tuple[str, ...] = ("_proj.weight",)
    """Of the names of the weights that are quantized."""
    writes_tokens: bool = True
    """Whether the tokens are compared, too: of one case a layout and method."""


def checkpoint(
    case: Case, folder: Path, family: str = "llama", dtype: str = "float32", ends: Iterable[str] = ()
) -> tuple[Path, dict[str, Tensor]]:
    """(directory, dequantized weights by name): the model of the zoo with those of its weights quantized.

    `plain` beside it has the dequantized weights in their place.
    """
    path, plain = folder / "model", folder / "plain"
    for copy in (path, plain):
        shutil.copytree(zoo.checkpoint(family, dtype), copy)
    state = load_file(path / "model.safetensors")
    known, values = dict(state), {}
    for name in [name for name in state if name.endswith(tuple(ends) or case.ends)]:
        tensors, values[name] = case.write(state.pop(name).float())
        module = name.removesuffix(".weight")
        state |= {module + suffix: tensor.contiguous() for suffix, tensor in tensors.items()}
    assert values
    save_file(state, path / "model.safetensors", {"format": "pt"})
    edit_config(path, quantization_config=case.config)
    cast = {name: value.to(known[name].dtype).contiguous() for name, value in values.items()}
    save_file(known | cast, plain / "model.safetensors", {"format": "pt"})
    return path, values


def edit_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


# Formats whose packages do not run here: packed by hand, word by word.


def integers(
    weight: Tensor, bits: int, symmetric: bool, group: int, groups: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(codes [N, K], scales [N, G], zeros [N, G]) with codes in 0 .. 2^bits - 1; `groups`: the group of each input."""
    index = torch.arange(weight.shape[1]) // group if groups is None else groups
    count, largest = int(index.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(len(weight), count), torch.empty(len(weight), count, dtype=torch.int64)
    for g in range(count):
        part = weight[:, index == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scales[:, g], zeros[:, g] = torch.maximum(-low, high) * 2 / largest, 2 ** (bits - 1)
        else:
            scales[:, g] = (high - low) / largest
            zeros[:, g] = (-low / scales[:, g]).round().clamp(0, largest).long()
    scales = scales.half()
    codes = ((weight / scales[:, index].float()).round().long() + zeros[:, index]).clamp(0, largest)
    return codes, scales, zeros


def words(codes: Tensor, bits: int, order: Iterable[int] | None = None) -> Tensor:
    """[..., n] -> [..., n * bits / 32] int32."""
    per = 32 // bits
    places = list(order or range(per))
    rows = codes.reshape(-1, codes.shape[-1] // per, per).tolist()
    packed = [[sum(value << (bits * places[j]) for j, value in enumerate(word)) for word in row] for row in rows]
    signed = [[word - (1 << 32) if word >= 1 << 31 else word for word in row] for row in packed]
    return torch.tensor(signed, dtype=torch.int32).reshape(*codes.shape[:-1], -1)


def stream(codes: Tensor, bits: int) -> Tensor:
    """[n, K] -> [n, K * bits / 32] int32: a row of bits, code after code, from the first word's lowest on."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * k) for k, code in enumerate(row))
        rows.append([(number >> (32 * w)) & 0xFFFFFFFF for w in range(codes.shape[1] * bits // 32)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    return (codes - zeros[:, index]).float() * scales[:, index].float()


def gptq(
    bits: int = 4, symmetric: bool = True, act_order: bool = False, less: int = 1, is_shared: bool = True
) -> Write:
    """`is_shared`: weights of as many inputs have one order, as those of the same inputs do; else each its own."""

    def write(weight: Tensor) -> Written:
        num_in = weight.shape[1]
        index = torch.arange(num_in) // GROUP
        if act_order:
            seed = num_in if is_shared else int(weight.abs().sum() * 1000)
            index = index[torch.randperm(num_in, generator=torch.Generator().manual_seed(seed))]
        codes, scales, zeros = integers(weight, bits, symmetric, GROUP, index)
        pack = stream if 32 % bits else words
        stored = {
            ".qweight": pack(codes, bits).T, ".scales": scales.T, ".g_idx": index.int(),
            ".qzeros": pack((zeros.T - less) % (1 << bits), bits),
        }  # fmt: skip
        return stored, dequantized(codes, scales, zeros, index)

    return write


def awq(weight: Tensor) -> Written:
    codes, scales, zeros = integers(weight, 4, False, GROUP)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    stored = {".qweight": words(codes.T, 4, order), ".qzeros": words(zeros.T, 4, order), ".scales": scales.T}
    return stored, dequantized(codes, scales, zeros, torch.arange(weight.shape[1]) // GROUP)


def fp8(weight: Tensor, block: int = 0) -> Written:
    """A scale for all, or one for each block of outputs and inputs."""
    rows, cols = (block, block) if block else weight.shape
    scales = torch.stack([
        torch.stack([part.abs().amax() / 448 for part in band.split(cols, 1)]) for band in weight.split(rows)
    ])  # fmt: skip
    whole = scales.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: len(weight), : weight.shape[1]]
    values = (weight / whole).to(torch.float8_e4m3fn)
    stored = {".weight": values} | ({".weight_scale_inv": scales} if block else {".weight_scale": scales.reshape(())})
    return stored, values.float() * whole


# Formats of packages that run here.


INPUT_SCALE = 0.03


def compressed(
    bits: int, kind: str, strategy: str, form: str, symmetric: bool = True, inputs: dict[str, Any] | None = None
) -> Case:  # fmt: skip
    """compressed-tensors writes and reads the tensors. `inputs`: further settings of activations of int8."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    group = GROUP if strategy == "group" else None
    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, group_size=group, symmetric=symmetric)
    input_args = QuantizationArgs(num_bits=8, **inputs) if inputs else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=input_args)
    is_static = inputs is not None and not inputs["dynamic"]
    compressor = BaseCompressor.load_from_registry(form)

    def write(weight: Tensor) -> Written:
        parts = weight.reshape(len(weight), -1, group or weight.shape[1])
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress(state, scheme)
        plain = compressor.decompress(dict(stored), scheme)["weight"]
        stored |= {"input_scale": torch.tensor([INPUT_SCALE])} if is_static else {}
        return {f".{name}": tensor for name, tensor in stored.items()}, plain.float()

    config = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }  # fmt: skip
    name = "fp8" if kind == "float" else "int4" if bits <= 4 else "int8"
    layout = f"{name}/{group or 'row'}/float32{'' if symmetric else '/zeros'}"
    if inputs and inputs.get("symmetric", True):
        layout += "/a8static" if is_static else "/a8"
    return Case(config, write, layout, writes_tokens=bits in (4, 8))


def micro(form: str, bits: int, layout: str) -> Case:
    """Floats of 4, 6 or 8 bits with exponents, or fp8 and a float for all, as scales; dequantized in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    is_nv = form.startswith("nv")
    group, kind = (16, torch.float8_e4m3fn) if is_nv else (32, torch.uint8)
    args = QuantizationArgs(num_bits=bits, type="float", strategy="tensor_group" if is_nv else "group",
                            group_size=group, symmetric=True, scale_dtype=kind)  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.load_from_registry(form)

    def write(weight: Tensor) -> Written:
        parts = weight.unflatten(1, (-1, group))
        whole = generate_gparam(weight.min(), weight.max()) if is_nv else None
        scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), args, whole)
        given = {"weight": weight, "weight_scale": scale} | ({"weight_global_scale": whole} if is_nv else {})
        stored = compressor.compress(given, scheme)
        shape = len(weight), weight.shape[1], torch.float32
        unpack = {4: unpack_fp4_from_uint8, 6: unpack_fp6_from_uint8}.get(bits)
        codes = unpack(stored["weight_packed"], *shape) if unpack else stored["weight"].float()
        plain = dequantize(codes, scale.float(), args=args, global_scale=whole, dtype=torch.float32)
        return {f".{name}": tensor for name, tensor in stored.items()}, plain

    groups = {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}
    config = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
              "config_groups": groups}  # fmt: skip
    return Case(config, write, layout, writes_tokens=False)


def quantize_inputs(model: torch.nn.Module, case: Case) -> None:
    """Makes the linears of layers quantize their inputs, as compressed-tensors does."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    args = QuantizationArgs(**case.config["config_groups"]["group_0"]["input_activations"])

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale, zero = torch.tensor([INPUT_SCALE]), None
        if args.dynamic:
            scale, zero = compute_dynamic_scales_and_zp(inputs[0], args, module)
        return (fake_quantize(inputs[0], scale, zero, args),)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(hook)


def bitsandbytes(kind: str, nested: bool = False) -> Case:
    def write(weight: Tensor) -> Written:
        from bitsandbytes import functional

        if kind == "int8":
            values, largest, _ = functional.int8_vectorwise_quant(weight.half())
            return {".weight": values, ".SCB": largest}, functional.int8_vectorwise_dequant(values, largest).float()
        packed, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type=kind, compress_statistics=nested)
        state_dict = {f".weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {".weight": packed} | state_dict, functional.dequantize_4bit(packed, state).float()

    config = {"quant_method": "bitsandbytes", f"load_in_{'8' if kind == 'int8' else '4'}bit": True}
    return Case(config, write, "int8/row/float32" if kind == "int8" else f"lut4/{GROUP}/float32/{kind}")


def mxfp4(weight: Tensor) -> Written:
    """[E, K, N] as gpt-oss has it; Transformers reads the codes."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = weight.mT.unflatten(-1, (-1, 32))
    exponents = torch.log2(blocks.abs().amax(-1).clamp(min=1e-30) / 6).ceil().clamp(-127, 127)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = blocks / torch.exp2(exponents).unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - values).abs().argmin(-1) + 8 * (scaled < 0)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    exponents = (exponents + 127).to(torch.uint8)
    plain = convert_moe_packed_tensors(packed, exponents, dtype=torch.float32)
    return {"_blocks": packed, "_scales": exponents}, plain


def cases() -> dict[str, Case]:
    """One for each way to publish weights."""
    gptq_config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    uneven = gptq_config | {"sym": False}
    by_token, static = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
    fp8_config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return {
        "gptq": Case(gptq_config, gptq(), "int4/32/float16"),
        "gptq-zeros": Case(uneven, gptq(symmetric=False), "int4/32/float16/zeros"),
        "gptq-v2": Case(uneven | {"checkpoint_format": "gptq_v2"}, gptq(symmetric=False, less=0),
                        "int4/32/float16/zeros"),
        "gptq-act-order": Case(gptq_config | {"desc_act": True}, gptq(act_order=True), "int4/32/float16/order"),
        "gptq-8bit": Case(gptq_config | {"bits": 8}, gptq(8), "int8/32/float16"),
        "awq": Case({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
                    awq, "int4/32/float16/zeros"),
        "fp8": Case(fp8_config, fp8, "fp8/row/float32"),
        "fp8-blocks": Case(fp8_config | {"weight_block_size": [32, 32]}, lambda weight: fp8(weight, 32),
                           "fp8/32/float32"),
        "w4a16": compressed(4, "int", "group", "pack-quantized"),
        "w4a16-zeros": compressed(4, "int", "group", "pack-quantized", symmetric=False),
        "w8a16": compressed(8, "int", "channel", "pack-quantized"),
        "w8a8": compressed(8, "int", "channel", "int-quantized"),
        "w3a16": compressed(3, "int", "group", "pack-quantized"),
        "w5a16-zeros": compressed(5, "int", "group", "pack-quantized", symmetric=False),
        "w8a8-token": compressed(8, "int", "channel", "int-quantized", inputs=by_token),
        "w8a8-static": compressed(8, "int", "channel", "int-quantized", inputs=static),
        "w8a8-uneven": compressed(8, "int", "channel", "int-quantized", inputs=by_token | {"symmetric": False}),
        "w4a8": compressed(4, "int", "group", "pack-quantized", inputs=by_token),
        "ct-fp8": compressed(8, "float", "channel", "float-quantized"),
        "ct-nvfp4": micro("nvfp4-pack-quantized", 4, "lut4/16/float32/e2m1"),
        "ct-mxfp4": micro("mxfp4-pack-quantized", 4, "lut4/32/float32/e2m1"),
        "ct-mxfp6": micro("mxfp6-pack-quantized", 6, VALUES),
        "ct-mxfp8": micro("mxfp8-quantized", 8, "fp8/32/float32"),
        "nf4": bitsandbytes("nf4"), "nf4-nested": bitsandbytes("nf4", nested=True), "fp4": bitsandbytes("fp4"),
        "bnb-int8": bitsandbytes("int8"),
        "mxfp4": Case({"quant_method": "mxfp4"}, mxfp4, "lut4/32/float32/e2m1"),
    }  # fmt: skip
