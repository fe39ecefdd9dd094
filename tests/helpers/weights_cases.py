"""Descriptions and comparisons of loaded weights."""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.capture.export import CapturedModel, describe, resolve_dtype
from fuseline.compile.capture.hf_model import build_on_meta, load_config
from fuseline.compile.config import CompileConfig
from fuseline.compile.specs import WeightSource


def described(config: CompileConfig) -> CapturedModel:
    """A captured model with its parameters and buffers but an empty graph."""
    hf_config = load_config(config)
    dtype = resolve_dtype(config, hf_config)
    model = build_on_meta(hf_config, dtype, False)
    return describe(
        model, fx.GraphModule({}, fx.Graph()), hf_config, dtype, {name for name, _ in model.named_buffers()}
    )


def everything(captured: CapturedModel) -> dict[str, WeightSource]:
    return {name: WeightSource((name,)) for name in [*captured.parameters, *captured.tied, *captured.constants]}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
