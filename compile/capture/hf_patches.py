"""Patches that Transformers models need before capture. The one place in compile/ that knows their classes."""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fuseline.compile.capture.kept_buffers import keep_buffers
from fuseline.compile.specs import RopeSwitchSpec


def patch_model(model: nn.Module) -> RopeSwitchSpec | None:
    """Patches the model in place. Returns how rope depends on the sequence's length, if it does."""
    switch = None
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind == "longrope":
            switch = _choose_factors_per_token(module)
        elif kind == "dynamic":
            switch = _choose_base_per_token(module)
        if hasattr(module, "layers_are_rescaled"):  # RWKV halves weights and states, against overflows of float16
            module.layers_are_rescaled, module.config.rescale_every = True, 0
        if hasattr(getattr(module, "config", None), "max_inference_chunksize"):  # xLSTM's prompts in pieces
            module.config.max_inference_chunksize = sys.maxsize
    return switch


def _choose_base_per_token(rotary: nn.Module) -> RopeSwitchSpec:
    """dynamic-NTK rope computes its base from the longest sequence seen; serving must not depend on others.

    A sequence of the original context keeps the original base, a longer one has that of the whole extended context.
    """
    original = rotary.config.max_position_embeddings
    rows = int(original * rotary.config.rope_parameters["factor"])
    long_inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](rotary.config, torch.device("cpu"), seq_len=rows)
    _switch_tables(rotary, long_inv_freq, rows)
    return RopeSwitchSpec(original, rows)


def _choose_factors_per_token(rotary: nn.Module) -> RopeSwitchSpec:
    """longrope picks its factors by the longest position of the batch; serving must pick by each sequence's length."""
    rows, settings = rotary.config.max_position_embeddings, rotary.config.rope_parameters
    threshold = settings["original_max_position_embeddings"]
    # PhiMoE chooses a scale by length instead, and keeps the short factors.
    scales = (settings["short_mscale"], settings["long_mscale"]) if "short_mscale" in settings else None
    seq_len = None if scales else threshold + 1
    long_inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, torch.device("cpu"), seq_len=seq_len)
    _switch_tables(rotary, long_inv_freq, rows, scales)
    return RopeSwitchSpec(threshold, rows)


def _switch_tables(
    rotary: nn.Module, long_inv_freq: Tensor, rows: int, scales: tuple[float, float] | None = None
) -> None:
    """The positions a patched model takes are rope rows: position for short sequences, rows + position for long ones.

    `scales`: of short and of long sequences; None: the model's own for both.
    """
    keep_buffers(rotary, {"long_inv_freq": long_inv_freq})

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        is_long = position_ids >= rows
        position = torch.where(is_long, position_ids - rows, position_ids)
        inv_freq = torch.where(is_long[..., None], self.long_inv_freq, self.original_inv_freq)
        freqs = position[..., None].float() * inv_freq
        emb = torch.cat((freqs, freqs), dim=-1)
        scale = torch.where(is_long, scales[1], scales[0])[..., None] if scales else self.attention_scaling
        return (emb.cos() * scale).to(x.dtype), (emb.sin() * scale).to(x.dtype)

    rotary.forward = types.MethodType(forward, rotary)
