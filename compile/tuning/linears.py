"""Level 3: the tiling of each matrix product of a model, measured once per machine and cached.

A choice sets the register tile and the chunk that a thread claims at once (csrc/cpu/kernels/linear.cpp), never the
summation order of an output: every choice gives the same bits.
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
from fuseline.compile.config import CompileConfig, Progress
from fuseline.compile.kernels.plan_call import meta_value, plan_call
from fuseline.compile.target import cpu_features
from fuseline.compile.tuning.clock import times_in_turns
from fuseline.compile.tuning.tuned import MIN_GAIN, measured_once

TUNE_LEVEL = 3
KERNEL = "linear"
ROWS = (1, 4, 12, 48, 256)
"""Rows measured for each of the kernel's ranges: up to 1, 6, 14, 64, and more."""
GROUPS = (1, 2, 3)
WIDTHS = (1, 2, 4, 8, 16)
"""Kernel codes for panels per tile (GROUPS) and per chunk (WIDTHS); code 0 leaves the value to the kernel."""
MAX_TENSORS = 16
"""Maximum number of weights of one shape, read in turn so that none stays in a cache."""
SLOW_SECONDS = 0.005
"""Slower products keep the kernel's default: measuring them would delay startup."""
ROUNDS = 3


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes and dtypes that determine the best tiling of a product."""

    num_k: int
    num_out: int
    weight_dtype: str
    dtype: str
    has_bias: bool


@dataclass(frozen=True)
class Product:
    """Calls of the same shape, one per node."""

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
    """Sets meta["choices"] of every node that the native kernel `linear` computes.

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
    """Minimum of the mean time per call over all tensors, choices interleaved; slow products are skipped."""
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
    """Nodes in graph order."""
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
    """One choice byte per range of rows: the panels of a tile are chosen, then those of a chunk."""
    found = bytearray(len(ROWS))
    for number, rows in enumerate(ROWS):
        if rows <= most_rows:
            best = _best(product, rows, [0, *GROUPS], measure)
            found[number] = _best(product, rows, [best, *(best | width << 2 for width in WIDTHS)], measure)
    return int.from_bytes(found, "little")


def _best(product: Product, rows: int, candidates: Sequence[int], measure: Measure) -> int:
    """The fastest choice; the first unless another is clearly faster."""
    seconds = measure(product, rows, [int.from_bytes(bytes([byte] * len(ROWS)), "little") for byte in candidates])
    fastest = min(range(len(candidates)), key=seconds.__getitem__)
    return candidates[fastest if seconds[fastest] < (1 - MIN_GAIN) * seconds[0] else 0]


def _key(nodes: Mapping[Shape, object]) -> str:
    """Cache key: products, kernels, processor and threads."""
    kernels = hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()
    parts = (kernels, _C.cpu_isa(), _C.num_threads(), cpu_features(), sorted(nodes))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
