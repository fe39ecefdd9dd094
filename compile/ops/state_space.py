"""State spaces: of heads (Mamba 2) and of channels (Mamba).

Legend: T tokens, H heads, V columns of a head, G groups, C channels, N states, L slots, P panels of 16 columns
(ops/recurrent.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fuseline.compile.ops.library import Make, ModelShape, Workload, op, same_layout
from fuseline.compile.ops.recurrent import (
    FLOAT,
    PANEL,
    from_panels,
    num_panels,
    over_slots,
    step_inputs,
    step_workloads,
    to_panels,
)


def head_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """x[T, H, V], dt[T, H], a[H], b, c[T, G, N], d[H], state[H, N, V] -> (out[T, H, V], state)."""
    x, dt, a = x.float(), dt.float(), a.float()
    b, c = (y.float().repeat_interleave(x.shape[1] // y.shape[1], 1) for y in (b, c))
    out = torch.zeros(x.shape)
    for t in range(len(x)):
        state = state * (dt[t] * a).exp()[:, None, None] + b[t, ..., None] * (x[t] * dt[t, :, None])[:, None]
        out[t] = (state * c[t, ..., None]).sum(1)
    return (out if d is None else out + d.float()[:, None] * x), state


@op(
    fake=lambda x, *_: x.new_empty(x.shape, dtype=FLOAT),
    state=lambda x, dt, a, b, *_: ((x.shape[2], num_panels(x.shape[3]), b.shape[3], PANEL), FLOAT),
)
def ssd_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """A state space whose decay is one number a head: x[1, T, H, V], dt[1, T, H], a[H], b, c[1, T, G, N], d[H].

    state = state * exp(dt * a) + b * (dt * x); result[1, T, H, V] = state * c + d * x, float32.
    """
    state = torch.zeros(x.shape[2], b.shape[3], x.shape[3])
    return head_scan(x[0], dt[0], a, b[0], c[0], d, state)[0][None]


def ssd_scan_inputs(make: Make) -> Iterator[tuple]:
    for groups, heads, dim, states in ((1, 4, 32, 16), (2, 4, 24, 8), (3, 3, 80, 5)):
        *where, tokens = step_inputs(make)
        x, dt = make.normal(1, tokens, heads, dim), make.normal(1, tokens, heads).abs()
        b, c = make.normal(1, tokens, 2 * groups, states).split(groups, 2)
        d = make.normal(heads) if groups < 3 else None
        state = to_panels(make.normal(5, heads, states, dim).float()).contiguous()
        yield x, dt, -make.normal(heads).float().abs(), b, c, d, state, *where


def ssd_scan_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """One group of 128 states, as in Mamba 2."""
    heads, dim, states = shape.num_heads, shape.head_dim, 128
    for label, tokens, slots, where in step_workloads(make):
        x, dt = make.fill(1, tokens, heads, dim), make.fill(1, tokens, heads)
        b, c = (make.fill(1, tokens, 1, states) for _ in range(2))
        state = to_panels(make.fill(slots, heads, states, dim).float()).contiguous()
        args = x, dt, -make.fill(heads).float(), b, c, make.fill(heads), state, *where
        yield Workload(f"{label} x {heads} heads", args, 5 * tokens * heads * dim * states)


@op(
    writes=("state",),
    fake=lambda x, *_: x.new_empty(x.shape, dtype=FLOAT),
    inputs=ssd_scan_inputs,
    workloads=ssd_scan_workloads,
    tolerance=60.0,
)
def ssd_scan_slots(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor, slots: Tensor,
    seq_lens: Tensor, query_start: Tensor,
) -> Tensor:  # fmt: skip
    """state[L, H, P, N, 16], float32."""
    out = x.new_empty(x.shape, dtype=FLOAT)

    def step(tokens: slice, old: Tensor) -> Tensor:
        parts = x[0, tokens], dt[0, tokens], a, b[0, tokens], c[0, tokens], d
        out[0, tokens], new = head_scan(*parts, from_panels(old, x.shape[3]))
        return to_panels(new)

    over_slots(state, slots, seq_lens, query_start, step)
    return out


def channel_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """x, dt[C, T], a[C, N], b, c[N, T], d[C], state[N, C] -> (out[C, T], state)."""
    dtype = x.dtype
    x, dt, a, b, c = (y.float() for y in (x, dt, a, b, c))
    out = torch.zeros(x.shape)
    for t in range(x.shape[1]):
        state = state * (dt[:, t] * a.T).exp() + b[:, t, None] * (dt[:, t] * x[:, t])
        out[:, t] = (state * c[:, t, None]).sum(0)
    out = out.to(dtype).float()
    return (out if d is None else out + d.float()[:, None] * x), state


@op(
    fake=lambda x, *_: same_layout(x, FLOAT),
    state=lambda x, dt, a, *_: ((num_panels(x.shape[1]), a.shape[1], PANEL), FLOAT),
)
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """A state space whose decay is one number a channel and state: x, dt[1, C, T], a[C, N], b, c[1, N, T], d[C].

    state = state * exp(dt * a) + b * (dt * x); result[1, C, T] = round(state * c) + d * x, float32.
    """
    return channel_scan(x[0], dt[0], a, b[0], c[0], d, torch.zeros(a.shape[1], a.shape[0]))[0][None]


def selective_scan_inputs(make: Make) -> Iterator[tuple]:
    for channels, states in ((40, 16), (16, 5)):
        *where, tokens = step_inputs(make)
        x, dt = make.normal(1, tokens, channels).mT, make.normal(1, channels, tokens).abs()
        b, c = make.normal(1, tokens, 2 * states).mT.split(states, 1)
        d = make.normal(channels).float() if states > 5 else None
        state = to_panels(make.normal(5, states, channels).float()).contiguous()
        yield x, dt, -make.normal(channels, states).float().abs(), b, c, d, state, *where


def selective_scan_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """Twice the hidden size and 16 states, as in Mamba."""
    channels, states = 2 * shape.hidden_size, 16
    for label, tokens, slots, where in step_workloads(make):
        x, dt = (make.fill(1, tokens, channels).mT for _ in range(2))
        b, c = (make.fill(1, tokens, states).mT for _ in range(2))
        state = to_panels(make.fill(slots, states, channels).float()).contiguous()
        args = x, dt, -make.fill(channels, states).float(), b, c, make.fill(channels).float(), state, *where
        yield Workload(f"{label} x {channels} channels", args, 5 * tokens * channels * states)


@op(
    writes=("state",),
    fake=lambda x, *_: same_layout(x, FLOAT),
    inputs=selective_scan_inputs,
    workloads=selective_scan_workloads,
    tolerance=60.0,
)
def selective_scan_slots(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor, slots: Tensor,
    seq_lens: Tensor, query_start: Tensor,
) -> Tensor:  # fmt: skip
    """state[L, P, N, 16], float32."""
    out = torch.empty_like(x, dtype=FLOAT)

    def step(tokens: slice, old: Tensor) -> Tensor:
        parts = x[0, :, tokens], dt[0, :, tokens], a, b[0, :, tokens], c[0, :, tokens], d
        out[0, :, tokens], new = channel_scan(*parts, from_panels(old, x.shape[1]))
        return to_panels(new)

    over_slots(state, slots, seq_lens, query_start, step)
    return out
