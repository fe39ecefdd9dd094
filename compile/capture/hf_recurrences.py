"""Transformers' recurrences as ops of ours, while a model is exported.

Modeling files call them by the names of functions of their own, which compute whole sequences by decomposed chunks.
While a model is exported those names stand for the functions here, one op each; they take no state, because capture
uses no cache. What is not used (the size of chunks, keywords for kernels of other packages) is ignored. Recurrences
that are written out in the `forward` of a module are replaced with it, by the name of its class.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseline.compile.capture.kept_buffers import keep_buffers
from fuseline.compile.ops import codes
from fuseline.compile.ops.causal_conv import NO_ACT

OPS = torch.ops.fuseline


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **unused: object
) -> Tensor:
    """[1, C, T], an activation that is not silu behind it."""
    is_silu = activation in ("silu", "swish")
    out = OPS.causal_conv(hidden_states, weight, bias, codes.UNARY["silu"] if is_silu else NO_ACT)
    if activation is None or is_silu:
        return out
    from transformers.activations import ACT2FN

    return ACT2FN[activation](out)


def chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *, use_qk_l2norm_in_kernel: bool = False,
    **unused: object,
) -> tuple[Tensor, None]:  # fmt: skip
    return OPS.gated_delta(query, key, value, g, beta, use_qk_l2norm_in_kernel), None


def mamba2_chunk_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 0,  # noqa: N803
    D: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,  # noqa: N803
    dt_limit: tuple[float, float] = (0.0, math.inf), return_final_states: bool = False, **unused: object,
) -> Tensor | tuple[Tensor, None]:  # fmt: skip
    """Time steps are prepared by plain ops, in the model's dtype as Transformers has them."""
    dt = _time_steps(dt, dt_bias, dt_softplus)
    low, high = dt_limit
    if high != math.inf or low > 0 or not dt_softplus:  # a softplus is not below 0
        dt = torch.clamp(dt, low, high)
    out = OPS.ssd_scan(hidden_states, dt, A, B, C, D)
    return (out, None) if return_final_states else out


def mamba_selective_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False, **unused: object,
) -> Tensor | tuple[Tensor, None]:  # fmt: skip
    """Channels are side by side in memory, where rows of pointwise ops must be too: hence the transposing."""
    dt = _time_steps(dt.mT, delta_bias, delta_softplus).mT
    out = OPS.selective_scan(hidden_states, dt, A, B, C, D)
    out = out if D is not None else out.to(hidden_states.dtype)
    out = out if z is None else (out.mT * F.silu(z.mT)).mT
    return (out, None) if return_last_state else out


def _time_steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


BY_NAME = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "chunk_kimi_delta_attention": chunk_gated_delta_rule,
    "mamba2_chunk_scan": mamba2_chunk_scan,
    "mamba_selective_scan": mamba_selective_scan,
}
"""By the names that modeling files call."""


def lightning_attention(
    self: nn.Module, hidden_states: Tensor, *unused: object, **keywords: object
) -> tuple[Tensor, None]:  # fmt: skip
    """MiniMax: a state space of a head in which keys are b, queries c and values x, decayed as much in each step."""
    heads = (*hidden_states.shape[:-1], self.num_attention_heads, 3 * self.head_dim)
    query, key, value = self.act_fn(self.qkv_proj(hidden_states)).view(heads).split(self.head_dim, -1)
    steps = self.fuseline_one.expand(value.shape[:-1])
    out = OPS.ssd_scan(value, steps, -self.slope_rate.flatten(), key, query, None).to(value.dtype)
    return self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * self.norm(out.flatten(2))), None


BY_CLASS = {"MiniMaxLightningAttention": lightning_attention}
"""By the names of modules' classes. Each such module has the constants of CONSTANTS."""
CONSTANTS = {"fuseline_one": [1.0]}


@contextmanager
def recurrences_as_ops(model: nn.Module) -> Iterator[None]:
    """The functions of the model's modeling files, and what its modules compute, replaced inside."""
    classes = {type(module) for module in model.modules()}
    files = {sys.modules[kind.__module__] for kind in classes}
    found = [(file, name, BY_NAME[name]) for file in files for name in BY_NAME if name in vars(file)]
    found += [(kind, "forward", BY_CLASS[kind.__name__]) for kind in classes if kind.__name__ in BY_CLASS]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in found]
    try:
        for place in found:
            setattr(*place)
        yield
    finally:
        for place in originals:
            setattr(*place)


def give_constants(model: nn.Module) -> None:
    """Registers the constants that the functions of BY_CLASS read."""
    for module in model.modules():
        if type(module).__name__ in BY_CLASS:
            keep_buffers(module, {name: torch.tensor(values) for name, values in CONSTANTS.items()})
