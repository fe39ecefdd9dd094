"""The gated delta rule: a linear attention that writes what its state does not predict.

Legend: T tokens, H heads (Hk of keys), K key dim, V value dim, L slots, P panels of 16 columns (ops/recurrent.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fuseline.compile.ops.library import Make, ModelShape, Workload, op
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

NORM_EPS = 1e-6
"""Of the squared norm of queries and keys."""


def normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, normalize: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k[T, Hk, K], v[T, H, V], g[T, H] or [T, H, K], beta[T, H], state[H, K, V] -> (out[T, H, V], state)."""
    heads = v.shape[1] // k.shape[1]
    q, k = (normalized(x.float()) if normalize else x.float() for x in (q, k))
    q, k = (x.repeat_interleave(heads, 1) for x in (q * q.shape[-1] ** -0.5, k))
    decay = g.float().exp().reshape(*g.shape[:2], -1, 1)
    out = torch.zeros(v.shape)
    for t in range(len(v)):
        state = state * decay[t]
        delta = (v[t].float() - (state * k[t, ..., None]).sum(1)) * beta[t, :, None].float()
        state = state + k[t, ..., None] * delta[:, None]
        out[t] = (state * q[t, ..., None]).sum(1)
    return out.to(v.dtype), state


def delta_state(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[tuple[int, ...], torch.dtype]:
    return (v.shape[2], num_panels(v.shape[3]), k.shape[3], PANEL), FLOAT


@op(fake=lambda q, k, v, *_: v.new_empty(v.shape), state=delta_state)
def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, normalize: bool) -> Tensor:
    """The gated delta rule: q, k[1, T, Hk, K], v[1, T, H, V], beta[1, T, H] -> [1, T, H, V].

    g[1, T, H] or [1, T, H, K] is the log of the state's decay, of a head or of each of its rows. `normalize`: queries
    and keys are divided by their norms first.
    """
    state = torch.zeros(v.shape[2], k.shape[3], v.shape[3])
    return delta_rule(q[0], k[0], v[0], g[0], beta[0], normalize, state)[0][None]


def gated_delta_inputs(make: Make) -> Iterator[tuple]:
    for keys, heads, key_dim, dim, by_row in ((2, 4, 16, 32, False), (3, 3, 24, 40, True), (1, 2, 8, 12, False)):
        *where, tokens = step_inputs(make)
        q, k = make.normal(1, tokens, 2 * keys, key_dim).split(keys, 2)
        v, beta = make.normal(1, tokens, heads, dim), make.normal(1, tokens, heads).sigmoid()
        decay = -make.normal(1, tokens, heads, *([key_dim] if by_row else [])).float().abs()
        state = to_panels(make.normal(5, heads, key_dim, dim).float()).contiguous()
        yield q, k, v, decay, beta, state, *where, dim != 40


def gated_delta_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    heads, dim = shape.num_heads, shape.head_dim
    for label, tokens, slots, where in step_workloads(make):
        q, k = (make.fill(1, tokens, shape.num_kv_heads, dim) for _ in range(2))
        v, beta = make.fill(1, tokens, heads, dim), make.fill(1, tokens, heads)
        state = to_panels(make.fill(slots, heads, dim, dim).float()).contiguous()
        args = q, k, v, -make.fill(1, tokens, heads).float(), beta, state, *where, True
        yield Workload(f"{label} x {heads} heads", args, 7 * tokens * heads * dim * dim)


@op(
    writes=("state",),
    fake=lambda q, k, v, *_: v.new_empty(v.shape),
    inputs=gated_delta_inputs,
    workloads=gated_delta_workloads,
    tolerance=60.0,
)
def gated_delta_slots(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor, seq_lens: Tensor,
    query_start: Tensor, normalize: bool,
) -> Tensor:  # fmt: skip
    """state[L, H, P, K, 16], float32."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)

    def step(tokens: slice, old: Tensor) -> Tensor:
        parts = (x[0, tokens] for x in (q, k, v, g, beta))
        out[0, tokens], new = delta_rule(*parts, normalize, from_panels(old, v.shape[3]))
        return to_panels(new)

    over_slots(state, slots, seq_lens, query_start, step)
    return out
