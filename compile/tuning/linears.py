"""Level 3: how each matrix product of a model is cut, measured once on this machine and kept in the cache.

A choice says which weights lie side by side in registers and how many a thread claims at once
(csrc/cpu/kernels/linear.cpp), never in which order an output is summed: any choice gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx

from fuseline import _C
from fuseline.compile.config import CompileConfig
from fuseline.compile.kernels.plan_call import meta_value, plan_call
from fuseline.compile.target import cpu_features
from fuseline.compile.tuning.clock import times_in_turns
from fuseline.compile.tuning.tuned import MIN_GAIN, Progress, measured_once

TUNE_LEVEL = 3
KERNEL = "linear"
ROWS = (1, 4, 12, 48, 256)
"""Stand for the ranges of rows that the kernel tells apart: up to 1, 6, 14, 64, and more."""
GROUPS = (1, 2, 3)
WIDTHS = (1, 2, 4, 8, 16)
"""Codes of the kernel; 0 leaves either to it."""
MAX_TENSORS = 16
"""Weights of one shape that are read in turns, so that none is found in a cache."""
SLOW_SECONDS = 0.005
"""A product that takes longer is left to the kernel: measuring it would hold up the start."""
ROUNDS = 3


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes and dtypes that decide how a product is best cut."""

    num_k: int
    num_out: int
    weight_dtype: str
    dtype: str
    has_bias: bool


@dataclass(frozen=True)
class Product:
    """Calls that are alike: one of their nodes' tensors each."""

    panels: Sequence[Tensor]
    bias: Tensor | None
    num_out: int
    dtype: torch.dtype


Measure = Callable[[Product, int, Sequence[int]], list[float]]
"""(product, rows, choices) -> seconds of each choice."""


def tune_linears(
    graph: fx.GraphModule, weights: Mapping[str, Tensor], config: CompileConfig, progress: Progress,
    measure: Measure | None = None,
) -> None:  # fmt: skip
    """Gives every node that the native kernel `linear` computes its choices, meta["choices"].

    `weights` by get_attr target.
    """
    nodes = _nodes(graph)
    most, measure = config.max_num_batched_tokens, measure or seconds_of
    choices = measured_once(
        config, _key(nodes), list(nodes), lambda shape: _choose(_product(nodes[shape], weights), most, measure),
        lambda _, choice: isinstance(choice, int) and 0 <= choice < 1 << 8 * len(ROWS), progress,
    )  # fmt: skip
    for shape, alike in nodes.items():
        for node in alike:
            node.meta["choices"] = choices[shape]


def seconds_of(product: Product, rows: int, choices: Sequence[int]) -> list[float]:
    """Shortest mean time of a call over all tensors, choices in turns; nothing is measured of a slow product."""
    x = torch.randn(rows, product.panels[0].shape[1]).to(product.dtype)
    out = torch.empty(rows, product.num_out, dtype=product.dtype)

    def one_round(choice: int) -> None:
        for panels in product.panels:
            torch.ops.fuseline_cpu.linear(out, x, panels, product.bias, product.num_out, choice)

    num_calls = len(product.panels)
    ((first,),) = times_in_turns([partial(one_round, 0)], 1)
    if first > SLOW_SECONDS * num_calls:
        return [0.0] * len(choices)
    times = times_in_turns([partial(one_round, choice) for choice in choices], ROUNDS)
    return [min(found) / num_calls for found in times]


def _nodes(graph: fx.GraphModule) -> dict[Shape, list[fx.Node]]:
    """In the graph's order."""
    found: dict[Shape, list[fx.Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        call = plan_call(node, meta_value) if node.op == "call_function" else None
        if call and call.kernel == KERNEL:
            x, panels, bias = call.inputs
            weight, dtype = panels.meta["val"], x.meta["val"].dtype
            found[Shape(weight.shape[1], call.ints[0], str(weight.dtype), str(dtype), bias is not None)].append(node)
    return dict(found)


def _product(alike: Sequence[fx.Node], weights: Mapping[str, Tensor]) -> Product:
    calls = [plan_call(node, meta_value) for node in alike[:MAX_TENSORS]]
    x, _, bias = calls[0].inputs
    panels = [weights[str(call.inputs[1].target)] for call in calls]
    return Product(panels, None if bias is None else weights[str(bias.target)], calls[0].ints[0], x.meta["val"].dtype)


def _choose(product: Product, most_rows: int, measure: Measure) -> int:
    """A byte for each range of rows."""
    found = [_choose_byte(product, rows, measure) if rows <= most_rows else 0 for rows in ROWS]
    return int.from_bytes(bytes(found), "little")


def _choose_byte(product: Product, rows: int, measure: Measure) -> int:
    """First the panels of a tile, then those of a chunk."""
    best = _best(product, rows, [0, *GROUPS], measure)
    return _best(product, rows, [best, *(best | width << 2 for width in WIDTHS)], measure)


def _best(product: Product, rows: int, candidates: Sequence[int], measure: Measure) -> int:
    """The fastest; the first unless another is clearly faster."""
    seconds = measure(product, rows, [int.from_bytes(bytes([byte] * len(ROWS)), "little") for byte in candidates])
    fastest = min(range(len(candidates)), key=seconds.__getitem__)
    return candidates[fastest if seconds[fastest] < (1 - MIN_GAIN) * seconds[0] else 0]


def _key(nodes: Mapping[Shape, object]) -> str:
    """Products, kernels, processor and threads decide."""
    kernels = hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()
    parts = (kernels, _C.cpu_isa(), _C.num_threads(), cpu_features(), sorted(nodes))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
