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

from fuseline.compile.capture.errors import CaptureError
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


def recurrent_block(
    self: nn.Module, input_states: Tensor, position_ids: Tensor, *unused: object, **keywords: object
) -> tuple[Tensor, None]:  # fmt: skip
    """RecurrentGemma: a short convolution before the gated linear unit."""
    x = causal_conv1d_fn(self.linear_x(input_states).mT, self.conv_1d.weight[:, 0], self.conv_1d.bias)
    return self.linear_out(self.rg_lru(x.mT, position_ids) * self.act_fn(self.linear_y(input_states))), None


def rg_lru(self: nn.Module, activations: Tensor, position_ids: Tensor) -> Tensor:
    """RecurrentGemma: h = exp(-dt) * h + x a channel, which is a state space whose inputs are x / dt.

    The first token of a sequence, which nothing is behind, is not scaled down.
    """
    gated = (activations * _gate(activations, self.input_gate_weight, self.input_gate_bias)).float()
    gate = _gate(activations, self.recurrent_gate_weight, self.recurrent_gate_bias)
    dt = (8.0 * gate * F.softplus(self.recurrent_param)).float()
    is_first = F.relu(_rest(position_ids.float()))[..., None]
    scaled = gated * (is_first + _rest(is_first) * _rest((-2.0 * dt).exp()).sqrt())
    decay = (-self.fuseline_one).expand(dt.shape[-1], 1)
    one = self.fuseline_one.expand(1, 1, dt.shape[1])
    return OPS.selective_scan((scaled / dt).mT, dt.mT, decay, one, one, None).mT.to(activations.dtype)


def _gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid of a block-diagonal linear: x[1, T, H * D], weight[H, D, D], bias[H, D]."""
    return _by_blocks(x.unflatten(-1, bias.shape), weight, bias, True).reshape(x.shape).sigmoid()


def _by_blocks(x: Tensor, weight: Tensor, bias: Tensor, is_transposed: bool) -> Tensor:
    """A linear of each block: x[1, T, H, D], weight[H, N, D], bias[H, N] -> [1, T, H, N].

    Blocks are experts, each block of a token a row that is sent to its own: no row depends on others.
    """
    tokens, num_blocks = x.shape[1], len(weight)
    blocks = torch.arange(num_blocks, device=x.device).expand(tokens, num_blocks).reshape(-1, 1)
    out = OPS.expert_linear(x.reshape(-1, x.shape[-1]), blocks, weight, bias, is_transposed)
    return out.reshape(1, tokens, num_blocks, -1)


def _rest(x: Tensor) -> Tensor:
    """1 - x in ops that have kernels."""
    return -x + 1.0


def rwkv_attention(self: nn.Module, hidden: Tensor, *unused: object, **keywords: object) -> tuple[Tensor, None]:
    """RWKV 4: the mean of the values with weights exp(key), which decay; the newest token has a weight of its own.

    The sums of values and of weights are states of one number a channel, needed as they are before the newest token.
    """
    receptance, key, value, _ = self.extract_key_value(hidden)
    key, value = key.float().clamp(-MOST_KEY, MOST_KEY), value.float()
    weight, newest = key.exp(), (key + self.time_first.float()).exp()
    decay, one = -self.time_decay.float().exp()[:, None], self.fuseline_one.expand(1, 1, key.shape[1])

    def earlier(x: Tensor) -> Tensor:
        sums = OPS.selective_scan(x.mT, self.fuseline_one.expand(x.mT.shape), decay, one, one, None)
        return _shifted(self, sums).mT

    mean = (earlier(weight * value) + newest * value) / (earlier(weight) + newest)
    return self.output(receptance * mean.to(receptance.dtype)), None


def mlstm(
    self: nn.Module, query: Tensor, key: Tensor, value: Tensor, igate: Tensor, fgate: Tensor, **unused: object
) -> tuple[Tensor, tuple[None, None, None]]:  # fmt: skip
    """xLSTM: the sum of values with weights exp(igate) that sigmoid(fgate) decays, over that of the weights.

    Transformers scales its states by the largest weight so far, or of a chunk, which changes rounding alone: gates
    are capped, so that no weight exceeds what float32 holds. The sum of weights is one more column of the state.
    """
    if not self.config.gate_soft_cap:
        raise CaptureError("xLSTM's gates are not capped (gate_soft_cap), which is not supported")
    dt = F.softplus(-fgate.float().mT)
    one = self.fuseline_one.expand(*value.shape[:-1], 1)
    x = torch.cat((value.float(), one), -1).transpose(1, 2) * (igate.float().mT.exp() / dt)[..., None]
    q, k = query.transpose(1, 2) * query.shape[-1] ** -0.5, key.transpose(1, 2)
    out = OPS.ssd_scan(x, dt, (-self.fuseline_one).expand(dt.shape[-1]), k, q, None)
    total, weights = out.split((value.shape[-1], 1), -1)
    mean = total / (weights.abs().clamp(min=1.0) + self.config.eps)
    return mean.to(query.dtype).transpose(1, 2), (None, None, None)


def shift_tokens(self: nn.Module, x: Tensor) -> Tensor:
    """A padding by one token in front, and one less at the end."""
    if self.padding != (0, 0, 1, -1):
        return F.pad(x, self.padding)
    return _shifted(self, x.mT).mT


def convolved_projection(self: nn.Module, hidden_states: Tensor, *unused: object) -> tuple[Tensor, Tensor, Tensor]:
    """Zaya: a convolution by channel, one by head, and values of which half are those of the token before."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
    heads, groups = q.view(shape), self.num_key_value_groups
    mean = (heads.unflatten(2, (-1, groups)) + k.view(shape).unsqueeze(3)) * 0.5
    channels, of_head = self.conv_qk_depthwise, self.conv_qk_grouped
    taps = [causal_conv1d_fn(torch.cat((q, k), -1).mT, channels.weight[:, 0], channels.bias).mT]
    while len(taps) < of_head.weight.shape[2]:
        taps.insert(0, _before(self, taps[0], channels.bias))
    rows = torch.stack(taps, -1).unflatten(2, (-1, self.head_dim)).flatten(3)
    weight = of_head.weight.view(-1, self.head_dim, rows.shape[-1])
    convolved = _by_blocks(rows, weight, of_head.bias.view(-1, self.head_dim), False)
    query, key = convolved.split((self.num_attention_heads, self.num_key_value_heads), 2)
    delayed = _before(self, self.v_proj_delayed(hidden_states), self.v_proj_delayed.bias)
    value = torch.cat((self.v_proj_current(hidden_states), delayed), -1).view(shape)
    return query + mean.flatten(2, 3), key + sum(mean.unbind(3)) / groups, value


def _before(module: nn.Module, x: Tensor, first: Tensor | None) -> Tensor:
    """x[1, T, C] of the token before; `first` for the first token, whose product or convolution was of zeros."""
    return _shifted(module, x.mT).mT if first is None else _shifted(module, (x - first).mT).mT + first


def _shifted(module: nn.Module, x: Tensor) -> Tensor:
    """x[1, C, T] of the token before."""
    return OPS.causal_conv(x, module.fuseline_before.to(x.dtype).expand(x.shape[1], 2), None, NO_ACT)


MOST_KEY = 60.0
"""exp of keys beyond it, in either direction, is taken for exp of it: sums of such weights stay finite."""
BY_CLASS = {
    "MiniMaxLightningAttention": lightning_attention,
    "RecurrentGemmaRecurrentBlock": recurrent_block,
    "RecurrentGemmaRglru": rg_lru,
    "RwkvSelfAttention": rwkv_attention,
    "ZeroPad2d": shift_tokens,
    "ZayaCCAProjection": convolved_projection,
    "xLSTMBackend": mlstm,
}
"""By the names of modules' classes. Each such module has the constants of CONSTANTS."""
CONSTANTS = {"fuseline_one": [1.0], "fuseline_before": [1.0, 0.0]}


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
