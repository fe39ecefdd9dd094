"""Causal convolution of each channel over its last tokens.

Legend: T tokens, C channels, W width of the convolution, L slots (ops/recurrent.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.activation import ACTIVATIONS
from fuseline.compile.ops.library import Make, ModelShape, Workload, op, same_layout
from fuseline.compile.ops.recurrent import over_slots, step_inputs, step_workloads

NO_ACT = -1


def convolve(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> tuple[Tensor, Tensor]:
    """x[C, T] behind before[C, W - 1] -> (out[C, T], the last W - 1 of both)."""
    both = torch.cat((before, x), 1)
    out = F.conv1d(both[None].float(), weight[:, None].float(), bias if bias is None else bias.float(),
                   groups=len(x))[0].to(x.dtype)  # fmt: skip
    return (out if act == NO_ACT else ACTIVATIONS[act](out)), both[:, x.shape[1] :]


@op(fake=lambda x, *_: same_layout(x), state=lambda x, weight, *_: ((weight.shape[1] - 1, x.shape[1]), x.dtype))
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """x[1, C, T], weight[C, W], bias[C]: each channel's sum over its last W tokens, then an activation or none (-1)."""
    return convolve(x[0], x.new_zeros(x.shape[1], weight.shape[1] - 1), weight, bias, act)[0][None]


def causal_conv_inputs(make: Make) -> Iterator[tuple]:
    """Channels side by side, as a projection gives them, and tokens side by side."""
    for channels, width, act in ((40, 4, codes.UNARY["silu"]), (21, 3, NO_ACT), (16, 2, NO_ACT)):
        *where, tokens = step_inputs(make)
        for x in (make.normal(1, tokens, channels + 8)[..., 8:].mT, make.normal(1, channels, tokens)):
            weight, bias = make.normal(channels, width), make.normal(channels) if width < 4 else None
            yield x, make.normal(5, width - 1, channels), weight, bias, *where, act


def causal_conv_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """As in Mamba: twice the hidden size, four tokens."""
    channels, width = 2 * shape.hidden_size, 4
    for label, tokens, slots, where in step_workloads(make):
        x, state = make.fill(1, tokens, channels).mT, make.fill(slots, width - 1, channels)
        args = x, state, make.fill(channels, width), make.fill(channels), *where, codes.UNARY["silu"]
        yield Workload(f"{label} x {channels} channels", args, 2 * tokens * channels * width)


@op(
    writes=("state",),
    fake=lambda x, *_: same_layout(x),
    inputs=causal_conv_inputs,
    workloads=causal_conv_workloads,
    tolerance=6.0,
    weights=("weight", "bias"),
)
def causal_conv_slots(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, seq_lens: Tensor,
    query_start: Tensor, act: int,
) -> Tensor:  # fmt: skip
    """state[L, W - 1, C]: the last inputs."""
    out = torch.empty_like(x)

    def step(tokens: slice, old: Tensor) -> Tensor:
        out[0, :, tokens], new = convolve(x[0, :, tokens], old.T, weight, bias, act)
        return new.T

    over_slots(state, slots, seq_lens, query_start, step)
    return out
