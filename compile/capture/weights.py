"""Weights from a checkpoint into the layout that the lowered graph reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from fuseline.compile.capture.export import CapturedModel
from fuseline.compile.config import CompileConfig
from fuseline.compile.specs import WeightSource
from torch import Tensor
from transformers import AutoModelForCausalLM

Progress = Callable[[str, int, int], None]
PANEL = 16


def load_weights(
    requests: Mapping[str, WeightSource], captured: CapturedModel, config: CompileConfig, progress: Progress | None
) -> dict[str, Tensor]:
    """One tensor per request, in its final layout."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=captured.dtype)
    state = model.state_dict() | captured.constants
    loaded: dict[str, Tensor] = {}
    for done, (key, source) in enumerate(requests.items()):
        loaded[key] = assemble([state.get(name) for name in source.names], source)
        if progress:
            progress("loading", done + 1, len(requests))
    return loaded


def assemble(parts: list[Tensor | None], source: WeightSource) -> Tensor:
    """Parts to the final tensor, as WeightSource says."""
    pads = source.pads or (0,) * len(parts)
    like = next(part for part in parts if part is not None)
    whole = [
        like.new_zeros(pad, *like.shape[1:]) if pad else (part.transpose(-1, -2) if source.transpose else part)
        for part, pad in zip(parts, pads, strict=True)
    ]
    tensor = torch.cat(whole) if len(whole) > 1 else whole[0]
    if source.dtype:
        tensor = tensor.to(getattr(torch, source.dtype))
    return pack(tensor) if source.layout == "panels" else tensor.contiguous()


def pack(weight: Tensor) -> Tensor:
    """[..., N, K] -> [..., ceil(N / 16), K, 16], zero padded."""
    rows, cols = weight.shape[-2:]
    panels = -(-rows // PANEL)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, panels * PANEL - rows))
    return padded.unflatten(-2, (panels, PANEL)).transpose(-1, -2).contiguous()
