"""A small model built for the CUDA target, and one decode step of it."""

from __future__ import annotations

from collections import Counter

import torch
from fake_gpu import GPU
from torch import fx
from zoo import checkpoint

from fuseline.compile.backends.cuda.executable import chosen_kernels
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.graph_inputs import StepInputs, make_step
from fuseline.compile.kernels.select import Kernels


def build(family: str, dtype: str = "bfloat16", graphs: GraphConfig | None = None, **settings):
    config = CompileConfig(model=str(checkpoint(family, dtype)), **settings)
    return compile_model(config, GPU, graphs=graphs)


def count_kernels(graph: fx.GraphModule) -> Counter[str]:
    """Calls of each kernel per step, without libraries."""
    return Counter(kernel.label for kernel in chosen_kernels(graph, Kernels(GPU, {})).values())


def decode_step(lengths: list[int], width: int = 2) -> StepInputs:
    """One token of each sequence, whose blocks are its own."""
    count = len(lengths)
    tables = torch.arange(1, 1 + count * width, dtype=torch.int32).reshape(1, count, width)
    return make_step([1] * count, lengths, tables, 16, token_ids=torch.arange(count) + 5)
