"""Which kernel computes a graph op on a card: an installed library's, ours in CUDA C++ or Triton, or torch's own.

Importing this needs no card and no triton; finding a kernel of ours needs triton, which every torch for CUDA brings.
An op may have several candidates (choice.py): the first that takes a call is the default, `-O3` measures which is
fastest for which rows (tuning/kernels.py) and leaves that in the node's meta["choices"].
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fuseline.compile.kernels import cuda_library
from fuseline.compile.kernels.choice import DECODE, PREFILL, ROWS, Candidate, default_choices, dispatcher, named
from fuseline.compile.target import Target

if TYPE_CHECKING:
    from fuseline.compile.kernels.cuda_library import CudaLibrary
    from fuseline.compile.kernels.external import ExternalAttention
    from fuseline.compile.kernels.native_cuda import NativeCudaKernel

aten = torch.ops.aten
OPS = torch.ops.fuseline
TORCH = ("aten", "prims")
WIDE = 8192
"""Outputs of a linear from which on cuBLASLt takes 4 to 14 % less time than our kernel of few rows in C++ (H200)."""
FILLING = 2048
"""Outputs of a linear from which on our kernel of few rows has a program for every processor of a card."""


@dataclass(frozen=True)
class CudaKernel:
    """`run` takes the op's arguments and gives its results."""

    label: str
    """Who computes it: torch.linear (cuBLASLt), cuda.rms_norm; several labels where rows or phase decide."""
    run: Callable
    into: Callable | None = None
    """As `run`, but the result is written to a tensor that comes first."""


def find_kernel(
    node: fx.Node, target: Target, external: ExternalAttention | None = None, constants: Collection[str] = ()
) -> CudaKernel | None:
    """By the shapes of the node's arguments; None for an op that nothing computes. `external`: None for no library.

    `constants` are targets of get_attr nodes whose memory nothing on the device writes.
    """
    if node.target is operator.getitem:
        return CudaKernel("getitem", operator.getitem)
    space, name = _name_of(node.target)
    if space not in ("fuseline", *TORCH):
        return CudaKernel(f"python.{getattr(node.target, '__name__', name)}", node.target)
    found = candidates(node, target, external, constants)
    if not found:
        return None
    choices = node.meta.get("choices") or default_choices(found)
    return CudaKernel(*dispatcher(found, choices, size_of(node)))


def candidates(
    node: fx.Node, target: Target, external: ExternalAttention | None = None, constants: Collection[str] = ()
) -> list[Candidate]:
    """All that can compute an op of torch's or ours, the default first."""
    args = fx.node.map_aggregate(node.args, lambda arg: arg.meta["val"] if isinstance(arg, fx.Node) else arg)
    if node.target is OPS.paged_attention.default and external is not None:
        return attention_candidates(args, target, external, str(node.args[3].target))
    kept = [isinstance(a, fx.Node) and a.op == "get_attr" and a.target in constants for a in node.args]
    return op_candidates(node.target, args, target, kept)


def op_candidates(op: Callable, args: tuple, target: Target, are_constant: Sequence[bool] = ()) -> list[Candidate]:
    """Without libraries; tensors perhaps on meta. `are_constant` of each argument; none given: of none."""
    in_cpp, others = _in_cpp(op, args, target, are_constant), _others(op, args)
    if in_cpp and op is aten.linear.default and args[1].shape[0] >= WIDE:
        return sorted([*in_cpp, *others], key=lambda candidate: candidate.label != "torch.linear")
    if in_cpp and op is OPS.paged_attention.default:
        # Of steps with prompts Triton has its part with each of those in CUDA C++.
        others = [replace(candidate, phases=(DECODE,)) for candidate in others if DECODE in candidate.phases]
    return [*in_cpp, *others]


def _in_cpp(op: Callable, args: tuple, target: Target, are_constant: Sequence[bool]) -> list[Candidate]:
    """The kernel of csrc/cuda, where its library is there and takes the arguments."""
    library = cuda_library.library_for(target)
    if library is None:
        return []
    from fuseline.compile.kernels.native_cuda import FEW_ROWS, KERNELS, linear_then_act_mul

    kernel = KERNELS.get(op)
    by_torch: list[Candidate] = []
    if op is OPS.linear_act_mul.default:
        by_torch = [Candidate("torch.linear, cuda.act_mul", named(partial(linear_then_act_mul, library)))]
    if kernel is None or not kernel.supports(*args):
        return by_torch
    if are_constant and kernel.weight is not None and are_constant[kernel.weight]:
        library = library.overlapping(cuda_library.Overlap.WEIGHTS)
    run = named(partial(kernel.run, library))
    if op is OPS.paged_attention.default:
        return _attention_in_cpp(kernel, library)
    if op in (aten.linear.default, OPS.linear_act_mul.default):
        return [*by_torch, Candidate(kernel.label, run, FEW_ROWS)]
    return [Candidate(kernel.label, run)]


def _attention_in_cpp(kernel: NativeCudaKernel, library: CudaLibrary) -> list[Candidate]:
    """Of steps of one token a sequence; of others, together with Triton's launch for sequences of several."""
    from fuseline.compile.kernels.triton import attention

    def candidate(label: str, phase: str, **tuning: object) -> Candidate:
        run, into = (named(partial(call, library, **tuning)) for call in (kernel.run, kernel.into))
        return Candidate(label, run, phases=(phase,), into=into)

    mixed = f"{kernel.label}, triton.paged_attention"
    tuned = [candidate(f"{mixed} {tuning}", PREFILL, tuning=tuning) for tuning in attention.PREFILL_TUNINGS]
    return [candidate(kernel.label, DECODE), candidate(mixed, PREFILL), *tuned]


def _others(op: Callable, args: tuple) -> list[Candidate]:
    """Triton's and torch's."""
    if op is aten.linear.default:
        return _linear(*args)
    space, name = _name_of(op)
    if space in TORCH:
        return [Candidate(f"torch.{name}", op)]
    from fuseline.compile.kernels.triton.table import KERNELS

    kernel = KERNELS.get(op)
    if kernel is None or not kernel.supports(*args):
        return []
    if op is OPS.linear_act_mul.default:
        return _linear_act_mul()
    if op is OPS.experts.default:
        return _experts(kernel.run, *args)
    if op is OPS.paged_attention.default:
        return _attention(kernel.run, kernel.into)
    return [Candidate(f"triton.{name}", kernel.run, into=kernel.into), *_other_launches(op, name, kernel.run)]


def attention_candidates(args: tuple, target: Target, external: ExternalAttention, table: str) -> list[Candidate]:
    """Libraries come first for prompts, ours for steps of one token a sequence: a row's bits depend on no other there.

    What a library offers for those is used only where it was measured to be faster. `table` names the block table
    among the graph's inputs.
    """
    ours = op_candidates(OPS.paged_attention.default, args, target)
    # Ours take whatever a library may be tried with.
    of_prompts = next((candidate.run for candidate in ours if PREFILL in candidate.phases), None)
    offered = external.candidates(args, table, of_prompts) if of_prompts else []
    prompts = [candidate for candidate in offered if PREFILL in candidate.phases]
    steps = [candidate for candidate in offered if PREFILL not in candidate.phases]
    return [*prompts, *ours, *steps]


def size_of(node: fx.Node) -> Callable[..., tuple[str, int]]:
    """What gives phase and rows of a call from its arguments."""
    if node.target is OPS.paged_attention.default:
        return attention_size
    if node.target in (OPS.rope_cache.default, OPS.write_cache.default):
        return write_size
    return rope_size if node.target is OPS.rope.default else linear_size


def linear_size(x: Tensor, *_: object) -> tuple[str, int]:
    """x[..., K]."""
    return ROWS, x.numel() // x.shape[-1]


def rope_size(x: Tensor, *_: object) -> tuple[str, int]:
    """x[1, H, T, D]."""
    return ROWS, x.shape[2]


def write_size(k_cache: Tensor, v_cache: Tensor, x: Tensor, *_: object) -> tuple[str, int]:
    """Of rope_cache and write_cache; x[1, H, T, D]."""
    return rope_size(x)


def attention_size(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *_: object) -> tuple[str, int]:
    """q[1, H, T, D], block_table[S, M]; as many sequences as tokens is a step of one token each."""
    num_tokens = q.shape[2]
    return (DECODE if num_tokens <= block_table.shape[0] else PREFILL), num_tokens


def linear_act_mul(x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """cuBLASLt's product and the activation on its own."""
    from fuseline.compile.kernels.triton import activation

    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return activation.act_mul(gate, up, act)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Candidate]:
    by_torch = Candidate("torch.linear", aten.linear.default)
    if x.dtype != weight.dtype or not x.dtype.is_floating_point:
        return [by_torch]
    from fuseline.compile.kernels.triton import linear, matmul

    ours, *others = _few_rows("triton.linear", linear.linear)
    if x.dtype.itemsize == 2:
        tiled = [Candidate(f"triton.matmul {tile}", partial(matmul.matmul, tile=tile)) for tile in matmul.TILES]
        others += [Candidate("triton.matmul", matmul.matmul), *tiled]
    return [ours, by_torch, *others] if weight.shape[0] >= FILLING else [by_torch, ours, *others]


def _linear_act_mul() -> list[Candidate]:
    from fuseline.compile.kernels.triton import linear

    ours, *others = _few_rows("triton.linear_act_mul", linear.linear_act_mul)
    return [ours, Candidate("torch.linear, triton.act_mul", linear_act_mul), *others]


def _few_rows(label: str, run: Callable) -> list[Candidate]:
    """The launch that the kernel chooses itself, then the others."""
    from fuseline.compile.kernels.triton import linear

    tuned = [Candidate(f"{label} {t}", partial(run, tuning=t), linear.ROWS) for t in linear.TUNINGS]
    return [Candidate(label, run, linear.ROWS), *tuned]


def _other_launches(op: Callable, name: str, run: Callable) -> list[Candidate]:
    from fuseline.compile.kernels.triton import norm, rope

    if op in (OPS.rope.default, OPS.rope_cache.default):
        return [Candidate(f"triton.{name} {n}h", partial(run, heads=n)) for n in rope.HEADS_TO_TRY]
    if name.endswith("_norm"):
        return [Candidate(f"triton.{name} {n}w", partial(run, num_warps=n)) for n in norm.WARPS_TO_TRY]
    return []


def _experts(run: Callable, x: Tensor, *_: object) -> list[Candidate]:
    from fuseline.compile.kernels.triton import experts

    tiles = experts.tiles(x.element_size())
    return [Candidate("triton.experts", run), *(Candidate(f"triton.experts {t}", partial(run, tile=t)) for t in tiles)]


def _attention(run: Callable, into: Callable) -> list[Candidate]:
    from fuseline.compile.kernels.triton import attention

    label = "triton.paged_attention"
    tuned = [
        Candidate(f"{label} {tuning}", partial(run, tuning=tuning), phases=(phase,), into=partial(into, tuning=tuning))
        for phase, tunings in ((DECODE, attention.DECODE_TUNINGS), (PREFILL, attention.PREFILL_TUNINGS))
        for tuning in tunings
    ]
    return [Candidate(label, run, phases=(DECODE, PREFILL), into=into), *tuned]


def _name_of(op: Callable) -> tuple[str, str]:
    """(namespace, name)."""
    space, _, name = str(getattr(op, "_schema", op)).partition("(")[0].partition("::")
    return space, name
