"""Overhead of running an execution plan: microseconds for 300 tiny ops, median of several runs.

    python -P benchmarks/plan_overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from fuseline import _C

WIDTH = 16


def tiny_plan(num_ops: int) -> tuple[_C.Plan, list[torch.Tensor]]:
    """A chain of additions over one row of 16 numbers."""
    plan = _C.Plan()
    rows = plan.add_symbol("T")
    memory = torch.zeros(2, WIDTH)
    bias = torch.ones(WIDTH)
    slot = plan.add_slot("bias")
    plan.set_slot(slot, bias.data_ptr())
    plan.set_arena(memory.data_ptr(), memory.nbytes)
    sizes, strides = [(1, rows), WIDTH], [WIDTH, 1]
    ends = [plan.add_tensor(-1, k * WIDTH * 4, "f32", sizes, strides) for k in range(2)]
    added = plan.add_tensor(slot, 0, "f32", [1, WIDTH], [WIDTH, 1])
    for k in range(num_ops):
        plan.add_call("binary", [ends[(k + 1) % 2], ends[k % 2], added], [0], [1.0], f"add{k}")
    return plan, [memory, bias]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=2000)
    args = parser.parse_args()
    plan, _keep = tiny_plan(args.ops)
    times = []
    for _ in range(args.repeats):
        begin = time.perf_counter_ns()
        plan.run([1])
        times.append((time.perf_counter_ns() - begin) / 1000)
    print(f"{args.ops} ops: median {statistics.median(times):.1f} us, minimum {min(times):.1f} us")


if __name__ == "__main__":
    main()
