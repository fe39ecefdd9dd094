"""Which weights of a checkpoint are quantized, and into which layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn

from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.hf_model import build_on_meta, load_config
from fuseline.compile.capture.load_formats import open_weights
from fuseline.compile.capture.weight_names import resolve
from fuseline.compile.config import CompileConfig
from fuseline.compile.ops.coded import Layout
from fuseline.compile.quantization.methods import quantization_config
from fuseline.compile.quantization.published import QuantizationError, dtype_name

GROUPS = {"int4": (32,), "int8": (128, 64, 32), "fp8": ()}
"""Inputs that may share a scale, by what to quantize to; none: all of a row."""
EXPERT = re.compile(r"\.experts\.\d+\.[^.]+\.weight$")
HEAD = "lm_head"


@dataclass(frozen=True)
class QuantizePlan:
    """What becomes of the stored tensors of a checkpoint."""

    folder: Path
    target: str
    """int4, int8 or fp8."""
    stored: Mapping[str, StoredTensor]
    layouts: Mapping[str, Layout]
    """By the names of the tensors that are quantized."""
    ignored: tuple[str, ...]
    """Linears that stay plain."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.meta.nbytes for tensor in self.stored.values())


def make_plan(config: CompileConfig, target: str, ignore: Sequence[str] = (HEAD,)) -> QuantizePlan:
    """Plans all linears, and experts that have a tensor each, but those that a glob of `ignore` matches by name or its
    last word. Raises CaptureError, LoadError."""
    try:
        if found := quantization_config(config):
            method = found.get("quant_method", "another method")
            raise CaptureError(f"{config.model} is quantized already, by {method}: give the one that it was made of")
    except QuantizationError as error:
        raise CaptureError(str(error)) from error
    model = build_on_meta(load_config(config), torch.bfloat16, config.trust_remote_code)
    stored = open_weights(config)
    direct, converted = resolve(stored, model)
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    of_linears = {name: direct.get(f"{name}.weight") for name in linears}
    of_experts = {name.removesuffix(".weight"): tensor for name, tensor in stored.items() if EXPERT.search(name)}
    chosen, ignored = [], []
    for module, tensor in {**of_linears, **of_experts}.items():
        is_ignored = any(fnmatch(word, glob) for glob in ignore for word in (module, module.rpartition(".")[2]))
        if tensor is None or is_ignored:
            ignored.append(module)
        elif tensor.meta.is_floating_point() and tensor.meta.ndim == 2:
            chosen.append(tensor)
    taken = {tensor.name for tensor in direct.values()} | {
        part.stored.name for one in converted.values() for lazies in one.taken.values() for lazy in lazies
        for part in lazy.slices if part.stored
    }  # fmt: skip
    # What reads images and sound is stored beside the model, and nobody quantizes it.
    others = [t.name for t in stored.values() if t.name not in taken and t.meta.ndim == 2]
    ignored += [name.removesuffix(".weight") for name in others if name.endswith(".weight")]
    if not chosen:
        raise CaptureError(f"{config.model} has no linear to quantize: all of them are ignored")
    return QuantizePlan(Path(config.model), target, stored, _layouts(chosen, target), tuple(ignored))


def _layouts(tensors: Sequence[StoredTensor], target: str) -> dict[str, Layout]:
    """One group for all weights whose inputs it divides, the largest that divides most; others have a scale a row."""
    inputs = [tensor.meta.shape[1] for tensor in tensors]
    group = max(GROUPS[target], key=lambda size: (sum(num % size == 0 for num in inputs), size), default=0)
    return {
        tensor.name: Layout(
            target, group if group and tensor.meta.shape[1] % group == 0 else 0,
            dtype_name(tensor.meta) if tensor.meta.itemsize == 2 else "float32",
        ) for tensor in tensors
    }  # fmt: skip
