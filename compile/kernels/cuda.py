"""Which kernel computes a graph op on a card: ours in CUDA C++ or Triton, or torch's own.

Importing this needs no card and no triton; finding a kernel of ours needs triton, which every torch for CUDA brings.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fuseline.compile.kernels import cuda_library
from fuseline.compile.target import Target

OPS = torch.ops.fuseline
TORCH = ("aten", "prims")


@dataclass(frozen=True)
class CudaKernel:
    """`run` takes the op's arguments and gives its results."""

    label: str
    """Who computes it: torch.linear (cuBLASLt), triton.rms_norm, cuda.rms_norm."""
    run: Callable


def find_kernel(node: fx.Node, target: Target) -> CudaKernel | None:
    """By the shapes of the node's arguments; None for an op that nothing computes."""
    if node.target is operator.getitem:
        return CudaKernel("getitem", operator.getitem)
    if (kernel := _in_cpp(node, target)) is not None:
        return kernel
    space, _, name = str(getattr(node.target, "_schema", node.target)).partition("(")[0].partition("::")
    if space in TORCH:
        return CudaKernel(f"torch.{name}", node.target)
    if space != "fuseline":
        return CudaKernel(f"python.{getattr(node.target, '__name__', space)}", node.target)
    return _ours(node, name)


def _in_cpp(node: fx.Node, target: Target) -> CudaKernel | None:
    """The kernel of csrc/cuda, where its library is there and takes the node's arguments."""
    library = cuda_library.library_for(target)
    if library is None:
        return None
    from fuseline.compile.kernels.native_cuda import KERNELS

    kernel = KERNELS.get(node.target)
    if kernel is None or not kernel.supports(*_values(node)):
        return None
    return CudaKernel(kernel.label, lambda *args: kernel.run(library, *args))


def _values(node: fx.Node) -> tuple:
    return fx.node.map_aggregate(node.args, lambda arg: arg.meta["val"] if isinstance(arg, fx.Node) else arg)


def _ours(node: fx.Node, name: str) -> CudaKernel | None:
    from fuseline.compile.kernels.triton.table import KERNELS

    if node.target is OPS.linear_act_mul.default:
        return CudaKernel("triton.linear_act_mul | torch.linear, triton.act_mul", linear_act_mul)
    kernel = KERNELS.get(node.target)
    if kernel is None or not kernel.supports(*_values(node)):
        return None
    return CudaKernel(f"triton.{name}", kernel.run)


def linear_act_mul(x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """Of few rows in one pass over the weights; of more, cuBLASLt's product and the activation on its own."""
    from fuseline.compile.kernels.triton import activation, linear

    if linear.supports(x[..., 0].numel()):
        return linear.linear_act_mul(x, weight, bias, act)
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return activation.act_mul(gate, up, act)
