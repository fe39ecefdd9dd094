"""Checks that a compiled region matches torch and is faster, before the region is used.

Both run on the same random inputs, with the sizes of a decode step of 1 and of 16 sequences, and of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fuseline.compile.backends.cpu_plan.sizes import SYMBOLS, evaluate, from_json
from fuseline.compile.tuning.clock import times_in_turns

STEPS = {(1, 1, 2, 1, 16, 32, 0, 4): 16, (16, 16, 17, 16, 16, 32, 0, 16): 4, (256, 2, 3, 2, 16, 32, 0, 4): 1}
"""Values of SYMBOLS for the tested steps, and their weights: decode steps are frequent."""
assert all(len(step) == len(SYMBOLS) for step in STEPS)
ROUNDING_STEPS = {torch.float32: 12.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Allowed deviation from torch, relative and absolute to the largest number: tolerance of ops in ops/library.py."""
TIMING_SECONDS, MAX_ROUNDS = 0.2, 200
Run = Callable[[list[Tensor]], object]


def find_fault(compiled: Run, eager: Run, tensors: Sequence[dict], num_outputs: int, num_threads: int = 1) -> str:
    """The reason to reject the compiled region; empty if it is accepted.

    `tensors` are described as in job.py, the last `num_outputs` are written. `num_threads`: torch's threads.
    """
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        seconds = {"it": 0.0, "torch": 0.0}
        for symbols, weight in STEPS.items():
            made = [make_tensor(described, symbols, generator) for described in tensors]
            if difference := _difference(compiled, eager, made, num_outputs):
                return f"{difference} ({symbols[0]} tokens)"
            # Many alternating calls, so that load on the machine affects both.
            runs = [partial(run, made) for run in (compiled, eager)]
            for name, times in zip(seconds, times_in_turns(runs, MAX_ROUNDS, TIMING_SECONDS), strict=True):
                seconds[name] += weight * min(times)
    finally:
        torch.set_num_threads(before)
    took = ", ".join(f"{name} takes {1e6 * value:.0f} us" for name, value in seconds.items())
    return f"slower than torch: {took} for {sum(STEPS.values())} steps" if seconds["it"] > seconds["torch"] else ""


def make_tensor(described: dict, symbols: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random numbers; integers are 0 or 1, which are safe as indices."""
    assert len(symbols) == len(SYMBOLS)
    sizes, strides = ([evaluate(from_json(n), symbols) for n in described[key]] for key in ("sizes", "strides"))
    dtype = getattr(torch, described["dtype"])
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    numbers = (
        torch.randn(extent, generator=generator)
        if dtype.is_floating_point
        else torch.randint(2, (extent,), generator=generator)
    )
    return numbers.to(dtype).as_strided(sizes, strides)


def _difference(compiled: Run, eager: Run, made: list[Tensor], num_outputs: int) -> str:
    inputs, outputs = made[: len(made) - num_outputs], made[len(made) - num_outputs :]
    results = []
    for run in (eager, compiled):
        places = [torch.empty_strided(out.shape, out.stride(), dtype=out.dtype) for out in outputs]
        for place in places:
            place.fill_(float("nan") if place.is_floating_point() else 1)
        run([*inputs, *places])
        results.append(places)
    for number, (expected, found) in enumerate(zip(*results, strict=True)):
        if not is_close(found, expected):
            return f"output {number} is not what torch computes"
    return ""


def is_close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    step = ROUNDING_STEPS.get(expected.dtype, 1.0) * torch.finfo(expected.dtype).eps
    scale = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=step, atol=step * max(1.0, scale), equal_nan=True)

