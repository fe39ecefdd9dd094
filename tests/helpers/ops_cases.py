"""Cases of every op, and checks of kernels against their reference and fake."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from native_fixtures import key_panels, plain_keys, with_threads
from torch import Tensor

from fuseline.compile.backends.cpu_plan.single import single_call
from fuseline.compile.ops.library import Make, Op
from fuseline.compile.ops.rope import FP8


def cases(op: Op, dtype: torch.dtype) -> list[tuple]:
    return list(op.inputs(Make(dtype, torch.Generator().manual_seed(1))))


def copies(args: tuple) -> list:
    return [arg.clone(memory_format=torch.preserve_format) if isinstance(arg, Tensor) else arg for arg in args]


def outputs(result: object) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def assert_close(found: Tensor, expected: Tensor, tolerance: float, half_tolerance: float = 1.0) -> None:
    assert found.dtype == expected.dtype
    if expected.dtype in FP8:
        steps, step = 1.0, torch.finfo(expected.dtype).eps
        found, expected = found.float(), expected.float()
        torch.testing.assert_close(found, expected, rtol=step, atol=step)
        return
    steps = tolerance if expected.dtype == torch.float32 else min(tolerance, half_tolerance)
    step = steps * torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    torch.testing.assert_close(found, expected, rtol=step, atol=step)


def assert_agrees(op: Op, args: tuple, run: Callable) -> None:
    """A GPU's kernel with the reference: outputs, and all that the arguments hold afterwards."""
    theirs, ours = copies(args), copies(args)
    expected, found = outputs(op.reference(*theirs)), outputs(run(*ours))
    assert len(found) == len(expected)
    for one, truth in zip(found, expected, strict=True):
        assert_close(one, truth, op.tolerance, op.half_tolerance)
    for mine, its in zip(ours, theirs, strict=True):
        if isinstance(mine, Tensor):
            assert torch.equal(as_bytes(mine), as_bytes(its)), "what is written in place, or nothing"


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of an fp8 tensor, whose values nothing compares."""
    return x.view(torch.uint8) if x.dtype in FP8 else x


def assert_lies_as_fake(op: Op, args: tuple, run: Callable) -> None:
    """Views that a graph takes of a result must be possible of the kernel's."""
    fakes = outputs(op.target(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args)))
    found = outputs(run(*copies(args)))
    assert [(x.shape, x.dtype, x.stride()) for x in found] == [(x.shape, x.dtype, x.stride()) for x in fakes]


def run_native(op: Op, args: tuple, like: list[Tensor]) -> list[Tensor]:
    """Outputs, then what was mutated. Keys in a cache lie as the kernels want them."""
    names = list(inspect.signature(op.reference).parameters)
    args = tuple(key_panels(arg) if name == "k_cache" else arg for name, arg in zip(names, args, strict=False))
    call = single_call(op, args)
    assert call.num_outputs == len(like)
    made = [torch.full_like(x, -77) if not x.is_floating_point() else torch.full_like(x, float("nan")) for x in like]
    given = (*made, *call.tensors[call.num_outputs :])
    getattr(torch.ops.fuseline_cpu, call.native.kernel)(*given, *call.native.ints, *call.native.floats)
    mutated = call.tensors[call.num_outputs :][: len(call.native.mutated)]
    keys = args[names.index("k_cache")] if "k_cache" in names else None
    return made + [plain_keys(x) if x is keys else x for x in mutated]


def run_reference(op: Op, args: tuple) -> list[Tensor]:
    """Outputs, then what was mutated. In float32 the truth is computed in float64, as torch's sums in float32 differ
    from machine to machine; not where every rounding is to be the reference's (tolerance 0)."""
    call = single_call(op, args)
    if call.native.mutated or op.tolerance == 0:
        return outputs(op.reference(*args)) + list(call.tensors[call.num_outputs :][: len(call.native.mutated)])
    return [narrow(x) for x in outputs(op.reference(*map(widen, args)))]


def widen(arg: object) -> object:
    return arg.double() if isinstance(arg, Tensor) and arg.dtype == torch.float32 else arg


def narrow(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def assert_kernels_agree(op: Op, dtype: torch.dtype) -> None:
    """The CPU kernel with the reference, the same bits with one thread and with two."""
    for args in cases(op, dtype):
        expected = run_reference(op, tuple(copies(args)))
        num_outputs = len(outputs(op.reference(*copies(args))))
        found = run_native(op, tuple(copies(args)), expected[:num_outputs])
        again = with_threads(2, lambda args=args, e=expected, n=num_outputs: run_native(op, tuple(copies(args)), e[:n]))
        for one, two, truth in zip(found, again, expected, strict=True):
            assert_close(one, truth, op.tolerance)
            assert torch.equal(one, two)


def assert_fake_agrees(op: Op) -> None:
    """Shapes and dtypes of the fake with the reference's."""
    for args in cases(op, torch.bfloat16):
        real = outputs(op.target(*copies(args)))
        fake = outputs(op.target(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args)))
        assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in fake]
